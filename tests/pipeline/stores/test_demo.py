"""The embedded data set, and what the demo run has to show on it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from pipeline import demo_devkit, open_voc
from pipeline.stores.demo import VERSION, demo_folder
from pipeline.stores.demo_drawing import CLASSES, draw
from pipeline.stores.voc import SPLITS

ROOT = Path(__file__).parents[3]
BASELINES = ("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour")


def test_a_drawing_is_a_function_of_seed_and_sample() -> None:
    code = (
        "from pipeline.stores.demo_drawing import draw; import sys; sys.stdout.buffer.write(draw(3, 77)[0])"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True
    ).stdout
    assert draw(3, 77)[0] == elsewhere
    assert len({draw(seed, sample)[0] for seed in (0, 3) for sample in (77, 78)}) == 4


def test_drawings_are_jpegs_of_many_sizes_and_some_are_grey() -> None:
    images = [Image.open(io.BytesIO(draw(0, sample)[0])) for sample in range(240)]
    assert {image.format for image in images} == {"JPEG"}
    assert len({image.size for image in images}) > 150
    orientations = Counter(
        (image.width > image.height) - (image.width < image.height) for image in images
    )
    assert min(orientations.values()) > 15, "portrait, square and landscape"
    assert 5 <= sum(image.mode == "L" for image in images) <= 45
    assert Counter(draw(0, sample)[1] for sample in range(40)) == dict.fromkeys(range(10), 4)


def test_the_folder_is_drawn_once_and_whole(cache: Path) -> None:
    progress: list[tuple[int, int]] = []
    folder = demo_folder(cache, lambda done, total: progress.append((done, total)))
    assert folder == cache / f"demo-{VERSION}"
    for split, count in (("train", 400), ("test", 100)):
        names = sorted(path.relative_to(folder / split) for path in (folder / split).rglob("*.jpg"))
        assert Counter(path.parts[0] for path in names) == dict.fromkeys(CLASSES, count)
    assert (folder / "test" / CLASSES[7] / "00003.jpg").read_bytes() == draw(0, 4037)[0]
    if progress:  # another test may have drawn it
        assert progress[-1] == (5000, 5000)
    before = folder.stat().st_mtime_ns
    assert demo_folder(cache) == folder
    assert folder.stat().st_mtime_ns == before


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_folder(tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_drawing_left_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / f".demo-{VERSION}-old", tmp_path / f".demo-{VERSION}-young"
    for leftover in (old, young):
        (leftover / "train").mkdir(parents=True)
    os.utime(old, (0, 0))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_folder(tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == [young]


def test_whoever_draws_first_wins(tmp_path: Path) -> None:
    theirs = tmp_path / f"demo-{VERSION}"

    def overtaken(done: int, total: int) -> None:
        (theirs / "train").mkdir(parents=True, exist_ok=True)

    assert demo_folder(tmp_path, overtaken) == theirs
    assert list(tmp_path.iterdir()) == [theirs]
    assert list(theirs.iterdir()) == [theirs / "train"]


# ── pictures of several objects ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def devkit(cache: Path) -> Path:
    return demo_devkit(cache, demo_folder(cache))


def where(item: dict[str, Any]) -> tuple[slice, slice]:
    box = {side: int(at) for side, at in item["bndbox"].items()}
    return slice(box["ymin"] - 1, box["ymax"]), slice(box["xmin"] - 1, box["xmax"])


def test_the_devkit_is_torchvisions(devkit: Path) -> None:
    """Its reader finds the pictures, the classes and the boxes that ours finds and that are in the pictures."""
    for split in SPLITS:
        store, targets, classes = open_voc(devkit, split)
        theirs = VOCDetection(str(devkit), year="2007", image_set=split)
        assert len(store) == len(theirs) == len(targets) == 300
        assert len(classes) == 10
        counts = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
        assert counts[0].min() > 30
        assert counts[1].min() > 2
        for i in range(0, 300, 7):
            image, about = theirs[i]
            objects: list[Any] = about["annotation"]["object"]
            own = {
                name: int(target)
                for name, target in zip(classes, targets[i], strict=True)
                if target >= 0
            }
            easy = {item["name"] for item in objects if item["difficult"] == "0"}
            assert own == {item["name"]: int(item["name"] in easy) for item in objects}
            assert (image.height, image.width) == (
                store.index["height"][i],
                store.index["width"][i],
            )
            assert theirs.images[i] == store.name(i)
            rest = np.asarray(image.convert("L"), dtype=float).copy()
            for item in objects:
                inside = where(item)
                assert rest[inside].std() > 20, "a pattern, where the box is, and no other object"
                rest[inside] = np.nan
            assert np.nanstd(rest) < 8, "grey, and what JPEG makes of edges, where none is"


def test_the_pictures_of_the_devkit_show_images_of_their_split_each_once(
    devkit: Path, cache: Path
) -> None:
    for split, source in zip(SPLITS, ("train", "test"), strict=True):
        paths = sorted((demo_folder(cache) / source).rglob("*.jpg"))
        images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        theirs, used = VOCDetection(str(devkit), year="2007", image_set=split), []
        for i in range(0, 300, 50):
            picture, about = theirs[i]
            for item in about["annotation"]["object"]:
                if item["difficult"] == "0":
                    shown = np.asarray(picture, dtype=int)[where(item)]
                    same = [k for k, one in enumerate(images) if one.shape == shown.shape]
                    same = [k for k in same if abs(images[k] - shown).mean() < 12]
                    assert [paths[k].parent.name for k in same] == [item["name"]]
                    used += same
        assert len(used) == len(set(used)) > 5


def test_the_devkit_is_drawn_once_whole_and_the_same(
    devkit: Path, cache: Path, tmp_path: Path
) -> None:
    demo, said = demo_folder(cache), list[tuple[int, int]]()
    again = demo_devkit(tmp_path, demo, lambda done, total: said.append((done, total)))
    assert said == [(i + 1, 600) for i in range(600)]
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


# ── what the demo run has to show ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_the_committed_runs_beat_every_baseline_by_twenty_points(seed: int) -> None:
    summary = json.loads((ROOT / "bench" / "results" / f"demo-seed{seed}.json").read_text())
    assert summary["knn_top1_trained"] >= 20 + max(summary[name] for name in BASELINES)


EVALUATIONS = {
    "knn": "knn",
    "linear-demo": "linear",
    "linear-demo-sweep": "linear --sweep",
    "semisup-10percent": "semisup",
    "semisup-1percent": "semisup --labels 0.01",
    "svm": "svm",
}


@pytest.mark.slow
def test_the_demo_learns_within_five_minutes_and_is_evaluated(tmp_path: Path) -> None:
    """The newcomer's command, but for the installation: drawn afresh, another seed than those committed."""
    began = time.monotonic()
    command = [sys.executable, ROOT / "train.py", "demo", "--seed", "3", "--device", "cpu"]
    env = os.environ | {"TWINFEED_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=600)
    elapsed_s = time.monotonic() - began
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["knn_top1_trained"] >= 20 + max(summary[name] for name in BASELINES), summary
    assert elapsed_s < 300

    results = {}
    for name, command in EVALUATIONS.items():
        began = time.monotonic()
        command = [sys.executable, ROOT / "evaluate.py", *command.split(), "--device", "cpu"]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=600)
        assert time.monotonic() - began < 120, name
        results[name] = json.loads((tmp_path / "runs" / "demo" / f"{name}.json").read_text())[
            "results"
        ]
    assert results["knn"]["knn_top1"] == pytest.approx(
        summary["knn_top1_trained"], abs=0.5
    )  # the same, once more
    assert results["linear-demo"]["top1"] > 40  # chance is 10
    assert results["linear-demo-sweep"]["top1"] >= results["linear-demo"]["top1"] - 3
    assert results["semisup-10percent"]["top1"] > 35
    assert results["semisup-1percent"]["top1"] > 25
    assert results["svm"]["map"] > 35  # chance is 20
    for command in ("predict", "export", "compare"):
        subprocess.run(
            [sys.executable, ROOT / "evaluate.py", command],
            cwd=tmp_path,
            env=env,
            check=True,
            timeout=60,
        )
