"""Reads the data sets that torchvision can download.

Those that consist of image files are read where they are; images of others are encoded as PNG.

Nothing is unpickled but the files of CIFAR, by torchvision, which checks their checksums first.
"""

from __future__ import annotations

import difflib
import inspect
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..images import SUFFIXES
from ..stores import Progress, cache_folder, class_names
from .source_types import FileSource, Source
from .staging import Item, stage


def open_torchvision(spec: str, progress: Progress, scratch: Path) -> Source:
    """The data set that `torchvision:NAME` or `torchvision:NAME:SPLIT` names.

    Raises:
        ValueError: torchvision has no such data set or split, or cannot download it.
    """
    import torchvision

    _, name, *rest = spec.split(":")
    split = ":".join(rest) if rest else None
    root = cache_folder() / "torchvision"
    data = _download(spec, name, split, root)

    classes = [
        text if isinstance(text, str) else ", ".join(text) for text in getattr(data, "classes", [])
    ]
    files = _image_files(data)
    if files:
        labels = np.array([-1 if label is None else label for _, label in files], dtype=np.int32)
        paths = [os.path.relpath(file, root) for file, _ in files]
        return FileSource(root, paths, classes or class_names(labels), labels, {})

    items = (_png_item(f"{spec}, image {i}", *data[i][:2]) for i in range(len(data)))
    identity = f"{spec}\n{torchvision.__version__}"
    return stage(items, classes, scratch, identity, progress, len(data))


def _download(spec: str, name: str, split: str | None, root: Path) -> Any:
    """The data set as torchvision opens it."""
    from torchvision import datasets

    dataset_class: Any = getattr(datasets, name) if name in datasets.__all__ else None
    parameters = inspect.signature(dataset_class).parameters if dataset_class else {}
    # Most have a parameter `download`, Imagenette's relatives pass it on.
    if "root" not in parameters or not parameters.keys() & {"download", "kwargs"}:
        similar = difflib.get_close_matches(name, datasets.__all__)
        examples = ", ".join(similar) or "CIFAR10, STL10 or Imagenette"
        raise ValueError(
            f"{spec}: torchvision has no downloadable data set {name!r}; try {examples}"
        )

    options: dict[str, Any] = {}
    if split is not None and "train" in parameters:
        if split not in ("train", "test"):
            raise ValueError(f"{spec}: {name} has the splits train and test")
        options["train"] = split == "train"
    elif split is not None:
        options["split"] = split
    try:
        root.mkdir(parents=True, exist_ok=True)
        return dataset_class(root=root, download=True, **options)
    except (OSError, RuntimeError, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{spec} cannot be downloaded ({reason}): "
            f"you can also put its files into {root} by hand"
        ) from error


def _image_files(data: Any) -> list[tuple[Any, Any]]:
    """Paths and labels of a data set that consists of image files; [] if it does not.

    torchvision has no common attribute for them.
    """
    if hasattr(data, "_labels"):
        paths = getattr(data, "_image_files", None) or data._images
        files = list(zip(paths, data._labels, strict=True))
    else:
        files = getattr(data, "samples", None) or getattr(data, "_samples", [])
    if all(str(file).lower().endswith(SUFFIXES) for file, _ in files):
        return files
    return []


def _png_item(name: str, image: Any, label: Any) -> Item:
    """A Pillow image, encoded without loss."""
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    is_label = isinstance(label, int | np.integer) and label >= 0
    return Item(name, encoded.getvalue(), int(label) if is_label else None)
