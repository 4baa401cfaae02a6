"""Decoders: encoded images and crop boxes in, uint8 crops out. One file per backend.

All follow the protocol `Decoder` in `decoder.py`; `open_decoder` chooses one. Start reading at
`cpu.py`, the simplest.
"""

from __future__ import annotations

import torch

from ..machine import usable_cores
from ..options import LoaderOptions
from ..recipe import Recipe
from ..stores import Store
from .cpu import CpuDecoder
from .decoder import Boxes, Crops, Decoder

__all__ = ["ALIASES", "DECODERS", "FOR_ANY_STORE", "Boxes", "Crops", "Decoder", "open_decoder"]

FOR_ANY_STORE = ("dali", "cpu")
DECODERS = (*FOR_ANY_STORE, "ffcv")  # FFCV reads only betons
ALIASES = {"torchvision": "cpu"}  # the name that the cpu decoder had


def open_decoder(store: Store, recipe: Recipe, options: LoaderOptions) -> Decoder:
    """The decoder that `options.decoder` names, for the images of `store`.

    `auto` takes DALI on a GPU if it is installed, and `cpu` otherwise. DALI decodes on the device
    of the options, the others on the CPU.

    Raises:
        ValueError: If the name is unknown, or the decoder cannot be imported or cannot read the
            store.
    """
    name = ALIASES.get(options.decoder, options.decoder)
    if name not in ("auto", *DECODERS):
        raise ValueError(f"unknown decoder {name!r}: choose auto or {', '.join(DECODERS)}")
    threads = options.threads or usable_cores()
    if name == "dali":
        return _open_dali(store, recipe, options, "as requested")
    if name == "ffcv":
        return _open_ffcv(store, recipe, threads)
    if name == "cpu":
        return CpuDecoder(store, recipe, threads, "as requested")

    if torch.device(options.device).type == "cpu":
        return CpuDecoder(store, recipe, threads, "no GPU")
    try:
        return _open_dali(store, recipe, options, "on a GPU")
    except ValueError as error:
        return CpuDecoder(store, recipe, threads, str(error))


def _open_dali(store: Store, recipe: Recipe, options: LoaderOptions, reason: str) -> Decoder:
    try:
        from .dali import DaliDecoder
    except ImportError as error:
        raise ValueError(
            f"DALI cannot be imported: {error}. Install it with `uv sync` (on Linux x86-64), "
            "or use --decoder cpu"
        ) from None
    threads = options.threads or usable_cores()
    device = torch.device(options.device)
    return DaliDecoder(store, recipe, threads, device, options.hw_decoder_load, reason)


def _open_ffcv(store: Store, recipe: Recipe, threads: int) -> Decoder:
    try:
        from .ffcv import FfcvDecoder
    except ImportError as error:
        raise ValueError(
            f"FFCV cannot be imported: {error}. Install it with `apt-get install libopencv-dev "
            "libturbojpeg0-dev pkg-config` and `uv sync --extra ffcv`, or use --decoder cpu"
        ) from None
    return FfcvDecoder(store, recipe, threads, "as requested")
