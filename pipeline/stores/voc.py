"""PASCAL VOC 2007: pictures of several objects, with an annotation each and lists for the splits.

VOCdevkit/VOC2007/JPEGImages/000005.jpg
                  Annotations/000005.xml
                  ImageSets/Main/trainval.txt, test.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from .folder import FolderStore
from .store import Progress, no_progress
from .subset import Subset

SPLITS = ("trainval", "test")

# What a picture holds of a class: an object, only difficult objects, or none.
PRESENT = 1
DIFFICULT = 0
ABSENT = -1

_Objects = list[tuple[str, int]]  # the class of each object, and PRESENT or DIFFICULT


def open_voc(
    root: Path, split: str, progress: Progress = no_progress
) -> tuple[Subset, NDArray[np.int8], list[str]]:
    """Open the pictures of a split and their classes.

    Args:
        root: The VOC2007 folder, or one or two levels above it.
        split: One of SPLITS.
        progress: Called with (done, total) while the pictures are indexed.

    Returns:
        The pictures [n], the targets (PRESENT, DIFFICULT or ABSENT, int8 [n, C]) and the names of
        the C classes, which are the sorted classes of both splits.

    Raises:
        ValueError: A file is missing or malformed; the message names it.
    """
    devkit = _find_devkit(root)
    ids = {name: _read_list(devkit / "ImageSets" / "Main" / f"{name}.txt") for name in SPLITS}
    objects: dict[str, _Objects] = {}
    for name in SPLITS:
        for id in ids[name]:
            objects[id] = _read_objects(devkit / "Annotations" / f"{id}.xml")

    classes = sorted({name for in_picture in objects.values() for name, _ in in_picture})
    targets = np.full((len(ids[split]), len(classes)), ABSENT, dtype=np.int8)
    for row, id in zip(targets, ids[split], strict=True):
        for name, target in objects[id]:
            column = classes.index(name)
            row[column] = max(row[column], target)

    pictures = _select(FolderStore(devkit / "JPEGImages", progress), ids[split], split)
    return pictures, targets, classes


def _find_devkit(root: Path) -> Path:
    for folder in (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007"):
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise ValueError(
        f"{root} holds no VOCdevkit/VOC2007/ImageSets/Main: "
        "unpack VOC2007's trainval and test there"
    )


def _read_list(path: Path) -> list[str]:
    """The ids of the pictures in a split."""
    try:
        ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}. Unpack VOC2007's trainval and test") from None
    if not ids:
        raise ValueError(f"{path} names no picture: unpack the devkit anew")
    return ids


def _select(pictures: FolderStore, ids: list[str], split: str) -> Subset:
    positions = {path: position for position, path in enumerate(pictures.paths)}
    samples = np.empty(len(ids), dtype=np.int64)
    for i, id in enumerate(ids):
        name = f"{id}.jpg"
        if name not in positions:
            reason = pictures.rejects.get(name, "it is not there")
            raise ValueError(
                f"{pictures.root / name}, of the {split} list: {reason}. Unpack the devkit anew"
            )
        samples[i] = positions[name]
    return Subset(pictures, samples)


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuses documents that define entities: a few lines of those can expand to gigabytes."""

    def doctype(self, *_: Any) -> NoReturn:
        raise ValueError("it has a DOCTYPE, which is refused")


def _read_objects(path: Path) -> _Objects:
    """The objects in an annotation."""
    try:
        parser = ElementTree.XMLParser(target=_TreeBuilder())
        return _parse_objects(ElementTree.fromstring(path.read_bytes(), parser))
    except OSError as error:
        reason = str(error.strerror)
    except (ValueError, ElementTree.ParseError) as error:
        reason = str(error)
    except LookupError as error:  # an unknown encoding
        reason = str(error)
    raise ValueError(f"{path}: {reason}. Unpack VOC2007's trainval and test anew")


def _parse_objects(annotation: ElementTree.Element) -> _Objects:
    if annotation.tag != "annotation":
        raise ValueError("it is not an annotation")
    objects = []
    for item in annotation.iter("object"):
        name = item.findtext("name", "").strip()
        if not name:
            raise ValueError("it has an object without a name")
        is_difficult = int(item.findtext("difficult", "0"))
        objects.append((name, DIFFICULT if is_difficult else PRESENT))
    return objects
