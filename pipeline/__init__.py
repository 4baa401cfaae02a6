"""Encoded images in, distorted views on the device out.

Start at `open_store` and `open_loader`, in a training loop of your own:

    store = open_store("photos")
    options = LoaderOptions(batch_size=256, device="cuda")
    loader = open_loader(store, barlow_twins(224), options)
    for epoch in range(100):
        for (view_a, view_b), labels, samples in loader.epoch(epoch):
            ...

Then read `loader.py`, which ties the parts together: a store (`stores/`, `formats/`), the order of
its samples (`order.py`), the random parameters of their views (`recipe.py`), a decoder
(`decoders/`) and the distortions (`distort.py`). `conversion/` writes record files.
"""

from __future__ import annotations

from pathlib import Path

from .conversion.journal import ConversionProgress
from .conversion.options import ConversionOptions
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
    FolderStore,
    MemoryStore,
    Progress,
    Store,
    Subset,
    cache_folder,
    check_labels,
    demo_devkit,
    demo_folder,
    find_splits,
    fingerprint,
    hold_out,
    no_progress,
    open_voc,
    random_subset,
    stratified_subset,
    subset_from_list,
    with_classes,
)
from .view_grid import view_grid

__all__ = [
    "DECODERS",
    "FORMATS",
    "FOR_ANY_STORE",
    "BadImage",
    "Batch",
    "ConversionOptions",
    "ConversionProgress",
    "ConversionResult",
    "Loader",
    "LoaderOptions",
    "MemoryStore",
    "Recipe",
    "Store",
    "Subset",
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
    "open_loader",
    "open_store",
    "open_voc",
    "random_subset",
    "stratified_subset",
    "subset_from_list",
    "usable_cores",
    "verify_store",
    "view_grid",
    "whole_view",
    "with_classes",
    "write_store",
]


def open_store(path: str | Path, progress: Progress = no_progress) -> Store:
    """Open the images at `path`.

    Args:
        path: A folder of images, with or without a sub-folder for each class, or a data set in
            one of FORMATS.
        progress: Called as progress(done, total) while the images are indexed.

    Raises:
        ValueError: If `path` holds no images that can be used.
    """
    path = Path(path)
    format = find_format(path)
    if format is None:
        return FolderStore(path, progress)
    return FORMATS[format].open(path, progress)


def open_loader(store: Store, recipe: Recipe, options: LoaderOptions) -> Loader:
    """Make a loader: batches of the images of `store`, distorted by `recipe`.

    Args:
        store: The encoded images, from `open_store`.
        recipe: How an image becomes views, for example `barlow_twins(224)`.
        options: Batch size, order, decoder, device and so on.

    Raises:
        ValueError: If the decoder is unknown or cannot be imported, or if there are fewer images
            than one batch.
    """
    return Loader(store, recipe, open_decoder(store, recipe, options), options)
