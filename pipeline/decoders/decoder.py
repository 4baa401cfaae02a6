"""`Decoder`: the protocol of all decoders. Encoded images and crop boxes in, uint8 crops out."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..order import Samples

Boxes = NDArray[np.float32]  # [V, B, 4] left, top, right, bottom, in pixels
# The crops uint8 [V, B, S, S, 3], and which of the samples decoded, bool [B].
Crops = tuple[Tensor, NDArray[np.bool_]]


class Decoder(Protocol):
    """Reads, decodes and crops the images of a store. Each image is decoded once for all its views.

    Attributes:
        name: One of DECODERS.
        reason: Why this decoder was chosen, in a few words for the log.
    """

    name: str
    reason: str

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        """Decode the batches of a plan, in its order.

        Args:
            plan: The samples [B] and the boxes [V, B, 4] of each batch. The decoder may take a few
                batches ahead.

        Yields:
            Of each batch, the crops uint8 [V, B, S, S, 3] of any strides, and which samples are
            good, bool [B]. Crops of samples that are not good have undefined values.

        Closing the generator ends everything that it has started.
        """
