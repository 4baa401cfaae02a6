"""Encoded images -> distorted views on the device. The front door: open_store, open_loader, Batch.

In somebody else's training loop:

    store = open_store("photos")
    loader = open_loader(store, barlow_twins(224), batch_size=256, device="cuda")
    for epoch in range(100):
        for (view_a, view_b), labels, samples in loader.epoch(epoch):
            ...
"""

from __future__ import annotations

from pathlib import Path

import torch

from .decoders import DECODERS, FOR_ANY_STORE, open_decoder
from .images import BadImage, encoded
from .loader import Batch, Loader
from .machine import describe_device, find_device, usable_cores
from .picture import view_picture
from .recipe import Recipe, barlow_twins, center_view, crop_view, whole_view
from .stores import (
    MemoryStore,
    Progress,
    Store,
    Subset,
    at_most,
    balanced,
    cache_folder,
    check_labels,
    fingerprint,
    hold_out,
    with_classes,
)
from .stores.demo import demo_folder
from .stores.folder import FolderStore, find_splits, listed
from .stores.formats import FORMATS, find_format
from .stores.shard import Written
from .stores.verify import verify_store
from .stores.voc import demo_devkit, open_voc
from .stores.write import Report, write_store

__all__ = [
    "DECODERS",
    "FORMATS",
    "FOR_ANY_STORE",
    "BadImage",
    "Batch",
    "Loader",
    "MemoryStore",
    "Recipe",
    "Report",
    "Store",
    "Subset",
    "Written",
    "at_most",
    "balanced",
    "barlow_twins",
    "cache_folder",
    "center_view",
    "check_labels",
    "crop_view",
    "demo_devkit",
    "demo_folder",
    "describe_device",
    "encoded",
    "find_device",
    "find_splits",
    "fingerprint",
    "hold_out",
    "listed",
    "open_loader",
    "open_store",
    "open_voc",
    "usable_cores",
    "verify_store",
    "view_picture",
    "whole_view",
    "with_classes",
    "write_store",
]


def open_store(path: str | Path, progress: Progress = lambda done, total: None) -> Store:
    """The encoded images at `path`: a folder, with or without a sub-folder for each class, or one of FORMATS.

    progress(done, total) is called while it is indexed. ValueError where there is nothing to train on.
    """
    format = find_format(Path(path))
    return FORMATS[format].open(Path(path), progress) if format else FolderStore(Path(path), progress)


def open_loader(
    store: Store,
    recipe: Recipe,
    *,
    batch_size: int,
    decoder: str = "auto",
    hw_decoder_load: float = 0.65,
    threads: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    shuffle_block: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Batches of `store` distorted by `recipe`: `batch_size` samples a step on each of `world` ranks.

    `threads` decode (default: one a core that this process may use). See `open_decoder` for `decoder` and
    `hw_decoder_load`, and `Loader` for the rest.
    """
    threads, device = threads or usable_cores(), torch.device(device)
    backend = open_decoder(decoder, store, recipe, threads, device, hw_decoder_load)
    return Loader(
        store,
        recipe,
        backend,
        threads=threads,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        shuffle=shuffle,
        shuffle_block=shuffle_block,
        device=device,
        dtype=dtype,
    )
