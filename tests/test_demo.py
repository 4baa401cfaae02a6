"""The embedded data set, and what the demo run has to show on it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipeline.stores.demo import CLASSES, VERSION, demo_folder, draw

ROOT = Path(__file__).parent.parent
BASELINES = ("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour")


def test_a_drawing_is_a_function_of_seed_and_sample() -> None:
    code = "from pipeline.stores.demo import draw; import sys; sys.stdout.buffer.write(draw(3, 77)[0])"
    elsewhere = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    assert draw(3, 77)[0] == elsewhere
    assert len({draw(seed, sample)[0] for seed in (0, 3) for sample in (77, 78)}) == 4


def test_drawings_are_jpegs_of_many_sizes_and_some_are_grey() -> None:
    images = [Image.open(io.BytesIO(draw(0, sample)[0])) for sample in range(240)]
    assert {image.format for image in images} == {"JPEG"}
    assert len({image.size for image in images}) > 150
    orientations = Counter((image.width > image.height) - (image.width < image.height) for image in images)
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


@pytest.mark.parametrize("seed", range(3))
def test_the_committed_runs_beat_every_baseline_by_twenty_points(seed: int) -> None:
    summary = json.loads((ROOT / "bench" / "results" / f"demo-seed{seed}.json").read_text())
    assert summary["knn_top1_trained"] >= 20 + max(summary[name] for name in BASELINES)


@pytest.mark.slow
def test_the_demo_learns_within_five_minutes(tmp_path: Path) -> None:
    """The newcomer's command, but for the installation: drawn afresh, another seed than those committed."""
    began = time.monotonic()
    command = [sys.executable, ROOT / "train.py", "demo", "--seed", "3", "--device", "cpu"]
    env = os.environ | {"TWINFEED_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=600)
    elapsed_s = time.monotonic() - began
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["knn_top1_trained"] >= 20 + max(summary[name] for name in BASELINES), summary
    assert elapsed_s < 300
