"""Encoded images -> distorted views on the device. The front door: open_store, open_loader, Batch.

In somebody else's training loop:

    store = open_store("photos")
    loader = open_loader(store, barlow_twins(224), LoaderOptions(batch_size=256, device="cuda"))
    for epoch in range(100):
        for (view_a, view_b), labels, samples in loader.epoch(epoch):
            ...
"""

from __future__ import annotations

from pathlib import Path

from .conversion.options import ConversionOptions
from .conversion.shard_writer import ConversionProgress
from .conversion.verify import verify_store
from .conversion.writer import ConversionResult, write_store
from .decoders import DECODERS, FOR_ANY_STORE, open_decoder
from .formats import FORMATS, find_format
from .images import BadImage, encoded_bytes
from .loader import Batch, Loader
from .machine import describe_device, find_device, usable_cores
from .options import LoaderOptions
from .recipe import Recipe, barlow_twins, center_view, crop_view, whole_view
from .stores import (
    MemoryStore,
    Progress,
    Store,
    Subset,
    cache_folder,
    check_labels,
    fingerprint,
    hold_out,
    random_subset,
    stratified_subset,
    with_classes,
)
from .stores.demo import demo_folder
from .stores.folder import FolderStore, find_splits, subset_from_list
from .stores.voc import demo_devkit, open_voc
from .view_grid import view_grid

__all__ = [
    "DECODERS",
    "FORMATS",
    "FOR_ANY_STORE",
    "BadImage",
    "Batch",
    "Loader",
    "LoaderOptions",
    "MemoryStore",
    "Recipe",
    "ConversionOptions",
    "ConversionResult",
    "Store",
    "Subset",
    "ConversionProgress",
    "random_subset",
    "stratified_subset",
    "barlow_twins",
    "cache_folder",
    "center_view",
    "check_labels",
    "crop_view",
    "demo_devkit",
    "demo_folder",
    "describe_device",
    "encoded_bytes",
    "find_device",
    "find_splits",
    "fingerprint",
    "hold_out",
    "subset_from_list",
    "open_loader",
    "open_store",
    "open_voc",
    "usable_cores",
    "verify_store",
    "view_grid",
    "whole_view",
    "with_classes",
    "write_store",
]


def open_store(path: str | Path, progress: Progress = lambda done, total: None) -> Store:
    """The encoded images at `path`: a folder, with or without a sub-folder for each class, or one of FORMATS.

    progress(done, total) is called while it is indexed. ValueError where there is nothing to train on.
    """
    format = find_format(Path(path))
    return (
        FORMATS[format].open(Path(path), progress) if format else FolderStore(Path(path), progress)
    )


def open_loader(store: Store, recipe: Recipe, options: LoaderOptions) -> Loader:
    """Batches of `store` distorted by `recipe`, decoded by the decoder that `options` name."""
    return Loader(store, recipe, open_decoder(store, recipe, options), options)
