"""The protocol of all decoders: encoded bytes and crop boxes in, uint8 crops out."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..order import Samples

Boxes = NDArray[np.float32]  # [V, B, 4]
Crops = tuple[Tensor, NDArray[np.bool_]]


class Decoder(Protocol):
    """Decodes each image once, whatever the number of its views."""

    name: str  # one of DECODERS
    why: str  # why it was chosen, in a few words

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        """For each (samples [B], boxes [V, B, 4]) of the plan, in its order and as many samples ahead as it likes:
        uint8 crops [V, B, S, S, 3] (any strides) and which samples were good, bool [B]. Closing it ends its threads."""
