"""Images that cannot be decoded: left out, or replaced, and reported; training continues."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipeline
from experiment.metrics import read_metrics
from pipeline.stores import FolderStore
from tests.helpers.images import encoded, picture
from tests.helpers.runs import TINY, Command, at_step, read_summary


def claims_20000_pixels(format: str) -> bytes:
    """A decompression bomb: a small image with a header that claims 20,000 x 20,000 pixels."""
    data = bytearray(encoded(picture(40, 40), format))
    if format == "PNG":
        data[16:24] = struct.pack(">II", 20_000, 20_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def sixteen_bit_png() -> bytes:
    levels = np.linspace(0, 65535, 50 * 40).astype(np.uint16)
    return encoded(Image.fromarray(levels.reshape(40, 50)), "PNG")


def lines_with(name: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if name in line]


@pytest.mark.parametrize("decoder", pipeline.FOR_ANY_STORE)
def test_unusual_images_are_trained_on_and_bad_ones_are_reported(
    train: Command, own_photos: Path, tmp_path: Path, decoder: str
) -> None:
    run = tmp_path / "run"
    good = encoded(picture(60, 60), quality=90)
    unusual = {
        "sixteen.png": sixteen_bit_png(),
        "cmyk.jpg": encoded(picture(60, 60, mode="CMYK")),
        "one.png": encoded(picture(1, 1), "PNG"),
    }
    without_a_size = {
        "bomb.png": claims_20000_pixels("PNG"),
        "bomb.jpg": claims_20000_pixels("JPEG"),
        "text.jpg": b"not an image",
        "empty.jpg": b"",
    }
    truncated = {"truncated.jpg": good[: len(good) // 2]}
    for name, data in {**unusual, **without_a_size, **truncated}.items():
        (own_photos / name).write_bytes(data)

    options = [*TINY, "--decoder", decoder, "--epochs", "6", "--log-steps", "1"]
    status, text = train("--data", own_photos, *options, "--run-folder", run)
    assert status == 0, text
    assert f"decoder {decoder} (as requested)" in text
    assert read_summary(run)["decoder"] == decoder

    for name in without_a_size:
        (line,) = lines_with(name, text)
        assert "left out" in line
        assert "bomb" not in name or "pixels" in line
    (line,) = lines_with("truncated.jpg", text)
    assert "replaced" in line
    assert str(own_photos / "truncated.jpg") in line
    for name in unusual:
        assert lines_with(name, text) == []

    assert json.loads((run / "config.json").read_text())["images"] == 44
    assert read_summary(run)["steps"] == 30
    assert read_metrics(run / "metrics.jsonl")[-1]["bad_images"] == 1


def test_an_image_that_turns_bad_is_replaced_reported_once_and_counted(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    image = sorted(own_photos.rglob("*.jpg"))[7]
    at_step(monkeypatch, 3, lambda: image.write_bytes(b"\xff\xd8 overwritten"))
    options = [*TINY, "--epochs", "4", "--log-steps", "1", "--run-folder", run]
    status, text = train("--data", own_photos, *options)
    assert status == 0, text
    (line,) = lines_with("replaced", text)
    assert str(image) in line
    counts = [row["bad_images"] for row in read_metrics(run / "metrics.jsonl")]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], len(counts)) == (0, 1, 20)


def test_images_that_turn_bad_while_others_are_reported_do_no_harm(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's thread may add to `loader.bad` while the loop puts the report together."""
    for path in sorted(own_photos.rglob("*.jpg"))[:3]:
        path.write_bytes(path.read_bytes()[:-300])
    loaders: list[pipeline.Loader] = []
    open_loader = pipeline.open_loader
    name = FolderStore.name

    def recorded_open_loader(*arguments: Any, **options: Any) -> pipeline.Loader:
        loaders.append(open_loader(*arguments, **options))
        return loaders[-1]

    def name_while_others_turn_bad(store: FolderStore, sample: int) -> str:
        bad = loaders[0].bad
        if len(bad) < 6:
            bad[39 - len(bad)] = "found just now"
        return name(store, sample)

    monkeypatch.setattr(pipeline, "open_loader", recorded_open_loader)
    monkeypatch.setattr(FolderStore, "name", name_while_others_turn_bad)
    options = [*TINY, "--epochs", "2", "--run-folder", tmp_path / "run"]
    status, text = train("--data", own_photos, *options)
    assert status == 0, text
    reported = text.count("replaced ")
    assert reported == len(loaders[0].bad) >= 6


def test_a_test_split_without_good_images_only_costs_the_scores(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train")
    for path in photos.rglob("*.jpg"):
        truncated = data / "val" / path.relative_to(photos)
        truncated.parent.mkdir(parents=True, exist_ok=True)
        truncated.write_bytes(path.read_bytes()[:-300])
    options = [*TINY, "--epochs", "1", "--run-folder", tmp_path / "run"]
    status, text = train("--data", data, *options)
    assert status == 0, text
    assert text.count("left out") == 10
    assert re.search(r"^and \d+ more$", text, re.MULTILINE), "the number of the others"
    summary = read_summary(tmp_path / "run")
    assert summary["knn_top1_trained"] is None
    assert Path(summary["export"]).exists()
