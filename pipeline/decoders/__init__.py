"""Bytes and crop boxes in, uint8 crops out: one file a backend, all behind the `Decoder` protocol."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..order import Samples
from ..recipe import Recipe
from ..stores import Store

Boxes = NDArray[np.float32]  # [V, B, 4]
Crops = tuple[Tensor, NDArray[np.bool_]]

FOR_ANY_STORE = ("dali", "torchvision")
DECODERS = (*FOR_ANY_STORE, "ffcv")  # FFCV reads betons alone


class Decoder(Protocol):
    """Decodes each image once, whatever the number of its views."""

    name: str  # one of DECODERS
    why: str  # this one, in a word or two

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        """For each (samples [B], boxes [V, B, 4]) of the plan, in its order and as many samples ahead as it likes:
        uint8 crops [V, B, S, S, 3] (any strides) and which samples were good, bool [B]. Closing it ends its threads."""


def open_decoder(
    name: str, store: Store, recipe: Recipe, threads: int, device: torch.device, hw_decoder_load: float
) -> Decoder:
    """The decoder of that name; `auto` is DALI on a GPU, where it is installed, and torchvision elsewhere.

    DALI decodes on `device`, with a share of `hw_decoder_load` on the GPU's JPEG engine; the others on the CPU.
    """
    if name not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {name!r}: choose auto or {', '.join(DECODERS)}")
    from .torchvision import TorchvisionDecoder

    asked = name != "auto"
    why = "as asked" if asked else "no GPU" if device.type == "cpu" else "on a GPU"
    if name == "dali" or why == "on a GPU":
        try:
            from .dali import DaliDecoder

            return DaliDecoder(store, recipe, threads, device, hw_decoder_load, why)
        except ImportError as error:
            why = f"DALI cannot be imported: {error}"
            if asked:
                raise ValueError(f"{why}. `pip install nvidia-dali-cuda130`, or choose another decoder") from None
    if name == "ffcv":
        try:
            from .ffcv import FfcvDecoder
        except ImportError as error:
            remedy = "`apt-get install libopencv-dev libturbojpeg0-dev pkg-config` and `uv sync --extra ffcv`"
            raise ValueError(f"FFCV cannot be imported: {error}. {remedy}, or choose another decoder") from None
        return FfcvDecoder(store, recipe, threads, why)
    return TorchvisionDecoder(store, recipe, threads, why)
