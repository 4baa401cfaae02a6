"""The verb train.py as a user meets it: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
import model
import pipeline
from experiment import presets
from experiment.run_folder import claim
from pipeline import machine
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.runs import (
    SUMMARY,
    TINY,
    Command,
    assert_refused,
    at_step,
    logged_steps,
    read_summary,
)

# ── what it writes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_leaves_nothing_behind(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cwd"))
    before = sorted(unlabelled.rglob("*"))
    status, text = train("--data", unlabelled, *TINY, "--dry-run")
    assert status == 0, text
    assert re.search(r"peak memory +\d+\.\d GB *\n", text)
    assert re.search(r"largest batch +all 40 images in one step would fit *\n", text)
    assert re.search(r"the whole run +about \d+ min on cpu, \d+ cores", text)
    assert list(Path.cwd().iterdir()) == []
    assert sorted(unlabelled.rglob("*")) == before


def test_a_labelled_folder_gives_a_summary_with_four_knn_scores(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, text = train("--data", photos, *TINY, "--run", run, "--epochs", "2", "--log-steps", "5")
    assert status == 0, text
    assert "decoder torchvision (no GPU) with" in text
    summary = read_summary(run)
    assert list(summary) == SUMMARY
    assert (summary["preset"], summary["backbone"], summary["decoder"]) == (
        "demo",
        "resnet18",
        "torchvision",
    )
    assert all(0 <= summary[name] <= 100 for name in SUMMARY if name.startswith("knn"))
    assert summary["steps"] == 2 * (54 // 8), "a tenth of the 60 is held out"
    assert summary["images_per_s"] > 0
    assert 0 <= summary["data_wait_fraction"] < 1
    assert logged_steps(run) == [0, 5, 10, 11]
    first, *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert (summary["loss_first"], summary["loss_last"]) == (first["loss"], last["loss"])
    assert torch.load(summary["checkpoint"], weights_only=True)["step"] == summary["steps"]
    exported = model.build_backbone("resnet18", 8)
    exported.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))
    assert summary["export"] == str(run / "backbone.safetensors")
    assert sorted(path.name for path in run.iterdir()) == [
        *(
            ".lock",
            "backbone.pth",
            "backbone.safetensors",
            "checkpoint.pt",
            "config.json",
            "correlation",
        ),
        *("environment.json", "metrics.jsonl", "summary.json"),
        *["tensorboard"] * bool(importlib.util.find_spec("tensorboard")),
        "views.png",
    ]
    assert list(Path.cwd().iterdir()) == []


def test_scores_are_those_of_the_exported_weights(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", tmp_path / "splits"
    for split, parity in (("train", 0), ("val", 1)):
        for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
            if i % 2 == parity:
                (folder / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / split / path.parent.name)
    status, text = train("--data", folder, *TINY, "--run", run, "--epochs", "4", "--lr", "6")
    assert status == 0, text
    assert json.loads((run / "config.json").read_text())["images"] == 30, (
        "val/ is not trained on, nor a class"
    )
    backbone = model.build_backbone("resnet18", 8).eval()
    backbone.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))
    splits = [
        pipeline.open_loader(
            pipeline.open_store(folder / split),
            pipeline.center_view(16),
            pipeline.LoaderOptions(batch_size=7, shuffle=False),
        ).epoch(0)
        for split in ("train", "val")
    ]
    expected = evaluation.knn_accuracies(
        *splits, {"trained": backbone, "pixels": evaluation.pixel_feature}
    )
    found = read_summary(run)
    assert found["knn_top1_trained"] == pytest.approx(expected["trained"])
    assert found["knn_top1_pixels"] == pytest.approx(expected["pixels"])


def test_a_folder_without_labels_trains_without_scores_and_an_earlier_run_is_kept(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for moved in (None, "run.1", "run.2"):
        status, text = train("--data", unlabelled, *TINY, "--run", run, "--epochs", "1")
        assert status == 0, text
        assert [read_summary(run)[name] for name in SUMMARY if name.startswith("knn")] == [None] * 4
        if moved:
            assert str(tmp_path / moved) in text
            assert (tmp_path / moved / "mark").read_text() == f"before {moved}"
            assert read_summary(tmp_path / moved)["checkpoint"] == str(run / "checkpoint.pt")
        (run / "mark").write_text(f"before run.{1 if moved is None else 2}")


# ── images that are not as they should be ────────────────────────────────────────────────────────────────────────────


def claims_20000_pixels(format: str) -> bytes:
    """An image whose header alone is wrong, as in a decompression bomb."""
    data = bytearray(encoded(picture(40, 40), format))
    if format == "PNG":
        data[16:24] = struct.pack(">II", 20_000, 20_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def sixteen_bits() -> bytes:
    image = Image.fromarray(np.linspace(0, 65535, 50 * 40).astype(np.uint16).reshape(40, 50))
    return encoded(image, "PNG")


@pytest.mark.parametrize("decoder", pipeline.FOR_ANY_STORE)
def test_odd_images_are_trained_on_or_reported_and_the_rest_goes_on(
    train: Command, tmp_path: Path, decoder: str
) -> None:
    folder, run = write_photos(tmp_path / "photos", 40, classes=1), tmp_path / "run"
    good = encoded(picture(60, 60), quality=90)
    odd = {
        "truncated.jpg": good[: len(good) // 2],
        "sixteen.png": sixteen_bits(),
        "cmyk.jpg": encoded(picture(60, 60, mode="CMYK")),
        "one.png": encoded(picture(1, 1), "PNG"),
        "bomb.png": claims_20000_pixels("PNG"),
        "bomb.jpg": claims_20000_pixels("JPEG"),
        "text.jpg": b"no image",
        "empty.jpg": b"",
    }
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    options = ("--decoder", decoder, "--epochs", "6", "--log-steps", "1")
    status, text = train("--data", folder, *TINY, "--run", run, *options)
    assert status == 0, text
    assert f"decoder {decoder} (as requested)" in text
    assert read_summary(run)["decoder"] == decoder
    said = {name: [line for line in text.splitlines() if name in line] for name in odd}
    for name in ("text.jpg", "empty.jpg", "bomb.png", "bomb.jpg"):
        (line,) = said[name]
        assert "left out" in line
    assert all("pixels" in said[name][0] for name in ("bomb.png", "bomb.jpg"))
    (line,) = said["truncated.jpg"]
    assert "replaced" in line
    assert str(folder / "truncated.jpg") in line
    assert said["sixteen.png"] + said["cmyk.jpg"] + said["one.png"] == []
    assert json.loads((run / "config.json").read_text())["images"] == 44
    assert read_summary(run)["steps"] == 30
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["bad_images"] == 1


def test_an_image_that_turns_bad_is_replaced_counted_and_said(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_photos(tmp_path / "photos", 40, classes=1), tmp_path / "run"
    victim = sorted(folder.rglob("*.jpg"))[7]
    at_step(monkeypatch, 3, lambda: victim.write_bytes(b"\xff\xd8 overwritten"))
    status, text = train("--data", folder, *TINY, "--run", run, "--epochs", "4", "--log-steps", "1")
    assert status == 0, text
    assert [str(victim) in line for line in text.splitlines() if "replaced" in line] == [True]
    counts = [
        json.loads(line)["bad_images"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], len(counts)) == (0, 1, 20)


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


def unusable(folder: Path) -> Path:
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(b"no image")
    return folder


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda folder: folder.rmdir(), ("data", "not there", "name a folder of images")),
    "empty": (lambda folder: None, ("data", "no image", ".jpg", ".png")),
    "a file": (
        lambda folder: (folder.rmdir(), folder.write_text("")),
        ("data", "not a folder", "name a folder"),
    ),
    "unreadable": (unusable, ("data", "none of its 10 images", "0.jpg")),
    "too few": (
        lambda folder: write_photos(folder, 5, classes=1),
        ("5 images", "batch of 8", "at most 5"),
    ),
}


@pytest.mark.parametrize("kind", list(BAD_FOLDERS))
def test_folders_without_enough_images_are_refused(
    train: Command, tmp_path: Path, kind: str
) -> None:
    make, words = BAD_FOLDERS[kind]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    assert_refused(train("--data", tmp_path / "data", *TINY, "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "--batch-size 0": ("--batch-size", "0", "at least"),
    "--batch-size 1": ("--batch-size", "1", "at least 2"),
    "--epochs 0": ("--epochs", "0", "at least 1"),
    "--size 0": ("--size", "0", "at least 1"),
    "--hold-out 1": ("--hold-out", "1", "between"),
    "--crop-area 0.5 0.1": ("--crop-area", "0.5", "range"),
    "--log-steps 0": ("--log-steps", "at least 1"),
    "--shuffle-block 0": ("--shuffle-block", "0", "at least 1"),
    "--threads 0": ("--threads", "0", "at least 1"),
    "--hw-decoder-load 65": ("--hw-decoder-load", "65", "from 0 to 1"),
    "--projector 32-x": ("projector", "32-x", "8192-8192-8192"),
    "--width 0": ("width", "0", "at least 1"),
    "--device cuda": ("GPU", "driver", "--device cpu"),
    "--device tpu": ("tpu", "cpu", "cuda"),
    "--resume": ("checkpoint.pt", "nothing to resume"),
}


@pytest.mark.parametrize("options", list(BAD_OPTIONS))
def test_impossible_options_are_refused(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    assert_refused(
        train("--data", unlabelled, *TINY, "--run", run, *options.split()), *BAD_OPTIONS[options]
    )
    assert not run.exists()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--decoder nvjpeg", ("nvjpeg", "--decoder", "auto", *pipeline.DECODERS)),
        ("--backbone vgg16", ("vgg16", "--backbone", *model.BACKBONES)),
        ("imagenet-900e", ("imagenet-900e", *presets.PRESETS)),
        ("--batch-size many", ("many", "--batch-size")),
        ("--learning-rate 1", ("--learning-rate",)),
    ],
)
def test_unknown_words_on_the_command_line_are_refused_with_the_known_ones(
    train: Command, arguments: str, words: tuple[str, ...]
) -> None:
    status, text = train(*arguments.split())
    assert status not in (0, 130)
    assert not [word for word in words if word not in text], text
    assert list(Path.cwd().iterdir()) == []


def test_a_preset_of_somebody_elses_images_asks_for_them(train: Command) -> None:
    assert_refused(train("imagenet-1000e", "--device", "cpu"), "imagenet-1000e", "--data DIR")
    assert list(Path.cwd().iterdir()) == []


def test_a_gpu_that_torch_cannot_use_is_an_error_and_never_silently_the_cpu(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    places = {"/dev": tmp_path / "dev", "/proc/driver/nvidia/gpus": tmp_path / "none"}
    monkeypatch.setattr(machine, "Path", lambda path: places[path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tiny = TINY[2:]  # without --device cpu
    assert_refused(
        train("--data", unlabelled, *tiny, "--run", tmp_path / "run"),
        "GPU",
        "driver",
        "--device cpu",
    )
    assert not (tmp_path / "run").exists()
    assert machine.find_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.find_device("auto").type == "cpu", "an empty list of GPUs is a choice"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "dev" / "nvidia0").unlink()
    assert machine.find_device("auto").type == "cpu", "no GPU in the machine"


def test_a_run_folder_that_cannot_be_written_is_named(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    assert_refused(
        train("--data", unlabelled, *TINY, "--run", tmp_path / "file" / "run"),
        str(tmp_path / "file"),
    )
    assert_refused(
        train("--data", unlabelled, *TINY, "--run", tmp_path / "file"), str(tmp_path / "file")
    )
    assert (tmp_path / "file").read_text() == "precious"


def test_a_loss_that_is_no_number_ends_the_run(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    options = ["--lr", "1e30", "--lr-biases", "1e30", "--warmup-epochs", "0", "--log-steps", "1"]
    assert_refused(
        train("--data", unlabelled, *TINY, "--run", tmp_path / "run", *options),
        "loss",
        "nan",
        "lower --lr",
    )
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_runs_cannot_share_a_folder(train: Command, unlabelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", unlabelled, *TINY, "--run", run, "--epochs", "1")
    assert train(*options)[0] == 0
    with claim(run):
        for again in (options, (*options, "--resume")):
            status, text = train(*again)
            assert status == 1
            assert "still going on" in text
    assert (run / "summary.json").exists()
    assert not (tmp_path / "run.1").exists()


def test_a_folder_that_is_no_run_is_left_alone(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for run, complaint in (("mine", "something else than a run"), ("mine/thesis.tex", "is a file")):
        status, text = train("--data", unlabelled, *TINY, "--run", tmp_path / run)
        assert status == 1
        assert complaint in text
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_test_split_of_which_nothing_decodes_costs_the_scores_alone(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train")
    for path in photos.rglob("*.jpg"):
        truncated = data / "val" / path.relative_to(photos)
        truncated.parent.mkdir(parents=True, exist_ok=True)
        truncated.write_bytes(path.read_bytes()[:-300])
    status, text = train("--data", data, *TINY, "--epochs", "1", "--run", tmp_path / "run")
    assert status == 0, text
    assert text.count("left out") == 11, "ten of them, and how many more"
    summary = read_summary(tmp_path / "run")
    assert summary["knn_top1_trained"] is None
    assert Path(summary["export"]).exists()
