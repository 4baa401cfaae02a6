"""The demo data of the SVM protocol: a VOC 2007 devkit composed from the demo data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..atomic_write import create_folder_once
from .store import Progress, no_progress
from .voc import SPLITS

_VERSION = 1  # part of the folder's name: raise it with every change to its pictures
_PICTURES = 300  # of each split
_GAP = 12  # px, at least, around each object


def demo_devkit(cache: Path, demo: Path, progress: Progress = no_progress) -> Path:
    """Make a devkit from the demo data set at `demo`; return the folder that holds VOCdevkit.

    A picture shows two or three images of the demo data; some are reduced to half the size and
    marked as difficult. Made once in `cache` (600 pictures, 17 MB).

    An image covers less than half a side of its picture. For the demo run, the mAP is 53 with views
    three times as large as it was trained on, 29 with views as large, and 21 by chance.
    """
    folder = cache / f"voc-{_VERSION}-{demo.name}"
    return create_folder_once(folder, lambda folder: _draw_devkit(folder, demo, progress))


def _draw_devkit(folder: Path, demo: Path, progress: Progress) -> None:
    devkit = folder / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (devkit / name).mkdir(parents=True)
    for number, (split, source) in enumerate(zip(SPLITS, ("train", "test"), strict=True)):
        rng = np.random.default_rng(number)
        images = np.array(sorted((demo / source).rglob("*.jpg")), dtype=object)
        unused = rng.permutation(images).tolist()
        ids = [f"{number * _PICTURES + i + 1:06d}" for i in range(_PICTURES)]
        for id in ids:
            chosen = [unused.pop() for _ in range(rng.integers(2, 4))]
            picture, annotation = _compose(f"{id}.jpg", chosen, rng)
            picture.save(devkit / "JPEGImages" / f"{id}.jpg", quality=90)
            (devkit / "Annotations" / f"{id}.xml").write_text(annotation)
            progress(int(id), 2 * _PICTURES)
        id_list = "".join(f"{id}\n" for id in ids)
        (devkit / "ImageSets" / "Main" / f"{split}.txt").write_text(id_list)


def _compose(
    filename: str, paths: Sequence[Path], rng: np.random.Generator
) -> tuple[Image.Image, str]:
    """A picture with each image at a random place in a cell of a 2 x 2 grid, and its annotation."""
    images: list[Image.Image] = [Image.open(path) for path in paths]
    difficult = rng.random(len(paths)) < 0.15
    cells = rng.permutation(4)  # the images take the first of them
    grey = int(rng.integers(110, 150))

    cell_size = np.max([image.size for image in images], axis=0) + _GAP  # width, height
    size = (2 * int(cell_size[0]) + _GAP, 2 * int(cell_size[1]) + _GAP)
    picture = Image.new("RGB", size, (grey, grey, grey))
    objects = ""
    for path, image, is_difficult, cell in zip(paths, images, difficult, cells, strict=False):
        shown = image.reduce(2) if is_difficult else image
        corner = _GAP + cell_size * divmod(cell, 2)
        room = cell_size - shown.size - _GAP
        left, top = (corner + rng.integers(0, room + 1)).tolist()
        picture.paste(shown, (left, top))
        box = (left, top, left + shown.width, top + shown.height)
        objects += _object_xml(path.parent.name, is_difficult, box)
    return picture, _annotation_xml(filename, picture, objects)


def _object_xml(name: str, is_difficult: bool, box: tuple[int, int, int, int]) -> str:
    left, top, right, bottom = box
    # VOC counts pixels from 1, and includes the last.
    corners = (
        f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    )
    return (
        f"\t<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(is_difficult)}</difficult><bndbox>{corners}</bndbox></object>\n"
    )


def _annotation_xml(filename: str, picture: Image.Image, objects: str) -> str:
    size = f"<width>{picture.width}</width><height>{picture.height}</height><depth>3</depth>"
    return (
        f"<annotation>\n\t<filename>{filename}</filename>\n"
        f"\t<size>{size}</size>\n{objects}</annotation>\n"
    )
