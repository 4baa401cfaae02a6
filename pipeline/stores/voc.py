"""PASCAL VOC 2007's devkit: pictures of several objects, an annotation each, and lists of which to train and test on.

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
from PIL import Image

from . import Progress, Subset
from .demo import drawn_once
from .folder import FolderStore

SPLITS = ("trainval", "test")
PRESENT, DIFFICULT, ABSENT = (
    1,
    0,
    -1,
)  # a class in a picture: an object of it, only difficult ones, none

_VERSION = 1  # part of the demo's folder: raise it with every change to its pictures
_PICTURES = 300  # of each split
_GAP = 12  # pixels around its objects, at least


def open_voc(
    root: Path, split: str, progress: Progress = lambda done, total: None
) -> tuple[Subset, NDArray[np.int8], list[str]]:
    """The pictures of `split` (of SPLITS), which classes are in each, int8 [n, C], and the C classes.

    `root` is the VOC2007 folder, or one or two above it. The classes are those of both splits, sorted. ValueError,
    with the file, where one is missing or is not as it should be.
    """
    tried = (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007")
    devkit = next((folder for folder in tried if (folder / "ImageSets" / "Main").is_dir()), None)
    if devkit is None:
        raise ValueError(
            f"{root} holds no VOCdevkit/VOC2007/ImageSets/Main: unpack VOC2007's trainval and test there"
        )
    named = {name: _listed(devkit / "ImageSets" / "Main" / f"{name}.txt") for name in SPLITS}
    objects = {
        id: _objects(devkit / "Annotations" / f"{id}.xml") for ids in named.values() for id in ids
    }
    classes = sorted({name for found in objects.values() for name, _ in found})
    targets = np.full((len(named[split]), len(classes)), ABSENT, dtype=np.int8)
    for row, id in zip(targets, named[split], strict=True):
        for name, target in objects[id]:
            row[classes.index(name)] = max(row[classes.index(name)], target)

    images = FolderStore(devkit / "JPEGImages", progress)
    places = {path: place for place, path in enumerate(images.paths)}
    for id in named[split]:
        if f"{id}.jpg" not in places:
            reason = images.rejects.get(f"{id}.jpg", "it is not there")
            raise ValueError(
                f"{images.root / f'{id}.jpg'}, of the {split} list: {reason}. Unpack the devkit anew"
            )
    samples = np.array([places[f"{id}.jpg"] for id in named[split]], dtype=np.int64)
    return Subset(images, samples), targets, classes


def _listed(path: Path) -> list[str]:
    try:
        ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}. Unpack VOC2007's trainval and test") from None
    if not ids:
        raise ValueError(f"{path} names no picture: unpack the devkit anew")
    return ids


class _Tree(ElementTree.TreeBuilder):
    """Without documents that define entities: a few lines of those can grow to gigabytes."""

    def doctype(self, *_: Any) -> NoReturn:
        raise ValueError("it declares a document type, which no annotation needs")


def _objects(path: Path) -> list[tuple[str, int]]:
    """Name, and PRESENT or DIFFICULT, of each object of an annotation."""
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Tree()))
        found = [
            (item.findtext("name", "").strip(), item.findtext("difficult", "0"))
            for item in root.iter("object")
        ]
        if root.tag != "annotation" or not all(name for name, _ in found):
            raise ValueError("no annotation, or one with an object without a name")
        return [(name, DIFFICULT if int(difficult) else PRESENT) for name, difficult in found]
    except (
        OSError,
        ValueError,
        LookupError,
        ElementTree.ParseError,
    ) as error:  # an unknown encoding is the third
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}. Unpack VOC2007's trainval and test anew") from None


def demo_devkit(cache: Path, demo: Path, progress: Progress = lambda done, total: None) -> Path:
    """A devkit made from the embedded data set at `demo`: two or three of its images in a picture, some as difficult
    objects, which are half as large. Made once in `cache` (600 pictures, 17 MB); the folder that holds VOCdevkit.

    Its images fill less than half a side: of views three times as large as the demo run's the mAP is 53, of equal ones
    29, of none 21.
    """
    return drawn_once(
        cache / f"voc-{_VERSION}-{demo.name}", lambda folder: _draw_devkit(folder, demo, progress)
    )


def _draw_devkit(folder: Path, demo: Path, progress: Progress) -> None:
    devkit = folder / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (devkit / name).mkdir(parents=True)
    for number, (split, source) in enumerate(zip(SPLITS, ("train", "test"), strict=True)):
        rng = np.random.default_rng(number)
        paths = rng.permutation(
            np.array(sorted((demo / source).rglob("*.jpg")), dtype=object)
        ).tolist()
        ids = [f"{number * _PICTURES + i + 1:06d}" for i in range(_PICTURES)]
        for id in ids:
            chosen = [paths.pop() for _ in range(rng.integers(2, 4))]  # each image in one picture
            picture, annotation = _compose(f"{id}.jpg", chosen, rng)
            picture.save(devkit / "JPEGImages" / f"{id}.jpg", quality=90)
            (devkit / "Annotations" / f"{id}.xml").write_text(annotation)
            progress(int(id), 2 * _PICTURES)
        (devkit / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{id}\n" for id in ids)
        )


def _compose(filename: str, paths: list[Path], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Images somewhere in some of four cells, on grey, and what an annotation says about them."""
    images: list[Image.Image] = [Image.open(path) for path in paths]
    difficult, cells, gray = (
        rng.random(len(paths)) < 0.15,
        rng.permutation(4),
        int(rng.integers(110, 150)),
    )
    cell = np.max([image.size for image in images], axis=0) + _GAP  # width, height
    picture = Image.new(
        "RGB", (2 * int(cell[0]) + _GAP, 2 * int(cell[1]) + _GAP), (gray, gray, gray)
    )
    objects = ""
    for path, image, flag, number in zip(paths, images, difficult, cells, strict=False):
        shown = image.reduce(2) if flag else image
        left, top = (
            _GAP + cell * divmod(number, 2) + rng.integers(0, cell - shown.size - _GAP + 1)
        ).tolist()
        picture.paste(shown, (left, top))
        box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + shown.width}</xmax>"
        box += f"<ymax>{top + shown.height}</ymax>"  # pixels, counted from 1, the last included
        objects += f"\t<object><name>{path.parent.name}</name><pose>Unspecified</pose><truncated>0</truncated>"
        objects += f"<difficult>{int(flag)}</difficult><bndbox>{box}</bndbox></object>\n"
    about = f"\t<size><width>{picture.width}</width><height>{picture.height}</height><depth>3</depth></size>\n"
    return (
        picture,
        f"<annotation>\n\t<filename>{filename}</filename>\n{about}{objects}</annotation>\n",
    )
