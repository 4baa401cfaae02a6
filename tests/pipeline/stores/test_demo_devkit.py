"""The VOC devkit that is composed from the demo data, compared with torchvision's reader of VOC."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from pipeline import demo_devkit, demo_folder, open_voc
from pipeline.stores.voc import SPLITS


@pytest.fixture(scope="module")
def devkit(cache: Path) -> Path:
    return demo_devkit(cache, demo_folder(cache))


def torchvision_reader(devkit: Path, split: str) -> VOCDetection:
    return VOCDetection(str(devkit), year="2007", image_set=split)


def objects_of(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = annotation["annotation"]["object"]
    return objects


def box_of(item: dict[str, Any]) -> tuple[slice, slice]:
    """The rows and columns of an object."""
    box = {side: int(pixel) for side, pixel in item["bndbox"].items()}
    return slice(box["ymin"] - 1, box["ymax"]), slice(box["xmin"] - 1, box["xmax"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_present_and_difficult_often_enough(devkit: Path, split: str) -> None:
    store, targets, classes = open_voc(devkit, split)
    assert len(store) == len(torchvision_reader(devkit, split)) == len(targets) == 300
    assert len(classes) == 10
    assert (targets == 1).sum(axis=0).min() > 30
    assert (targets == 0).sum(axis=0).min() > 2


@pytest.mark.parametrize("split", SPLITS)
def test_torchvision_finds_the_same_pictures_and_classes(devkit: Path, split: str) -> None:
    store, targets, classes = open_voc(devkit, split)
    reader = torchvision_reader(devkit, split)
    for i in range(0, 300, 7):
        image, annotation = reader[i]
        objects = objects_of(annotation)
        easy = {item["name"] for item in objects if item["difficult"] == "0"}
        ours = {
            name: int(target)
            for name, target in zip(classes, targets[i], strict=True)
            if target >= 0
        }
        assert ours == {item["name"]: int(item["name"] in easy) for item in objects}
        assert (image.height, image.width) == (store.index["height"][i], store.index["width"][i])
        assert reader.images[i] == store.name(i)


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_hold_the_objects_and_the_rest_is_grey(devkit: Path, split: str) -> None:
    reader = torchvision_reader(devkit, split)
    for i in range(0, 300, 7):
        image, annotation = reader[i]
        rest = np.asarray(image.convert("L"), dtype=float).copy()
        for item in objects_of(annotation):
            box = box_of(item)
            assert rest[box].std() > 20, "a pattern, which no other object covers"
            rest[box] = np.nan
        assert np.nanstd(rest) < 8, "grey, with the artifacts of JPEG at the edges"


@pytest.mark.parametrize(("split", "source"), [("trainval", "train"), ("test", "test")])
def test_pictures_show_images_of_their_own_split_once_each(
    devkit: Path, cache: Path, split: str, source: str
) -> None:
    paths = sorted((demo_folder(cache) / source).rglob("*.jpg"))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    reader = torchvision_reader(devkit, split)
    used: list[int] = []
    for i in range(0, 300, 50):
        picture, annotation = reader[i]
        for item in objects_of(annotation):
            if item["difficult"] == "1":
                continue
            shown = np.asarray(picture, dtype=int)[box_of(item)]
            matches = [
                k
                for k, image in enumerate(images)
                if image.shape == shown.shape and abs(image - shown).mean() < 12
            ]
            assert [paths[k].parent.name for k in matches] == [item["name"]]
            used += matches
    assert len(used) == len(set(used)) > 5


def test_the_devkit_is_complete_reproducible_and_drawn_only_once(
    devkit: Path, cache: Path, tmp_path: Path
) -> None:
    demo = demo_folder(cache)
    progress: list[tuple[int, int]] = []
    again = demo_devkit(tmp_path, demo, lambda done, total: progress.append((done, total)))
    assert progress == [(i + 1, 600) for i in range(600)]
    files = sorted(path.relative_to(devkit) for path in devkit.rglob("*") if path.is_file())
    assert len(files) == 600 + 600 + 2
    assert all((again / file).read_bytes() == (devkit / file).read_bytes() for file in files)
    before = again.stat().st_mtime_ns
    assert demo_devkit(tmp_path, demo, lambda done, total: pytest.fail("drawn again")) == again
    assert again.stat().st_mtime_ns == before

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(again)
    with pytest.raises(KeyboardInterrupt):
        demo_devkit(tmp_path, demo, interrupt)
    assert os.listdir(tmp_path) == []
