"""Bytes and crop boxes in, uint8 crops out: one file a backend, all behind the `Decoder` protocol."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..order import Samples
from ..recipe import Recipe
from ..stores import Store

Boxes = NDArray[np.float32]  # [V, B, 4]
Crops = tuple[Tensor, NDArray[np.bool_]]

DECODERS = ("torchvision",)


class Decoder(Protocol):
    """Decodes each image once, whatever the number of its views."""

    name: str  # one of DECODERS

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        """For each (samples [B], boxes [V, B, 4]) of the plan, in its order and as many samples ahead as it likes:
        uint8 crops [V, B, S, S, 3] (any strides) and which samples were good, bool [B]. Closing it ends its threads."""


def open_decoder(name: str, store: Store, recipe: Recipe, threads: int) -> Decoder:
    """The decoder of that name; `auto` is the fastest that this machine has for `store`."""
    if name not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {name!r}: choose auto or {', '.join(DECODERS)}")
    from .torchvision import TorchvisionDecoder

    return TorchvisionDecoder(store, recipe, threads)
