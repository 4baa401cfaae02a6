"""Wrong data and options of train.py: one line with what is wrong and how to put it right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import model
import pipeline
from experiment import presets
from pipeline import machine
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, Command, assert_refused


def make_missing(folder: Path) -> None:
    folder.rmdir()


def make_empty(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def make_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


def make_unreadable(folder: Path) -> None:
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(b"not an image")


def make_too_few(folder: Path) -> None:
    write_photos(folder, 5, classes=1)


BAD_FOLDERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    make_missing: ("data", "not there", "name a folder of images"),
    make_empty: ("data", "no image", ".jpg", ".png"),
    make_file: ("data", "not a folder", "name a folder"),
    make_unreadable: ("data", "none of its 10 images", "0.jpg"),
    make_too_few: ("5 images", "batch of 8", "5 or less"),
}


@pytest.mark.parametrize("make", list(BAD_FOLDERS), ids=lambda make: make.__name__)
def test_folders_without_enough_images_are_refused(
    train: Command, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    result = train("--data", data, *TINY, "--run-folder", tmp_path / "run")
    assert_refused(result, *BAD_FOLDERS[make])
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "--batch-size 0": ("--batch-size", "0", "at least"),
    "--batch-size 1": ("--batch-size", "1", "at least 2"),
    "--epochs 0": ("--epochs", "0", "at least 1"),
    "--size 0": ("--size", "0", "at least 1"),
    "--hold-out 1": ("--hold-out", "1", "between"),
    "--crop-area 0.5 0.1": ("--crop-area", "0.5", "smaller one first"),
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
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    result = train("--data", unlabelled, *TINY, "--run-folder", run, *options.split())
    assert_refused(result, *BAD_OPTIONS[options])
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
def test_unknown_names_are_refused_with_a_list_of_the_known_ones(
    train: Command, arguments: str, words: tuple[str, ...]
) -> None:
    status, text = train(*arguments.split())
    assert status not in (0, 130)
    assert not [word for word in words if word not in text], text
    assert list(Path.cwd().iterdir()) == []


def test_a_preset_without_images_of_its_own_needs_data(train: Command) -> None:
    assert_refused(train("imagenet-1000e", "--device", "cpu"), "imagenet-1000e", "--data DIR")
    assert list(Path.cwd().iterdir()) == []


def test_a_gpu_that_torch_cannot_use_is_an_error(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not silently take the CPU."""
    gpu = tmp_path / "dev" / "nvidia0"
    gpu.parent.mkdir()
    gpu.touch()
    places = {"/dev": tmp_path / "dev", "/proc/driver/nvidia/gpus": tmp_path / "none"}
    monkeypatch.setattr(machine, "Path", lambda path: places[path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device, name, *without_device = TINY
    assert (device, name) == ("--device", "cpu")
    result = train("--data", unlabelled, *without_device, "--run-folder", tmp_path / "run")
    assert_refused(result, "GPU", "driver", "--device cpu")
    assert not (tmp_path / "run").exists()
    assert pipeline.find_device("cpu").type == "cpu"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pipeline.find_device("auto").type == "cpu", "the GPU is hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    gpu.unlink()
    assert pipeline.find_device("auto").type == "cpu", "there is no GPU"


def test_a_loss_that_is_nan_ends_the_run(train: Command, unlabelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--lr", "1e30", "--lr-biases", "1e30", "--warmup-epochs", "0", "--log-steps", "1"]
    result = train("--data", unlabelled, *TINY, *options, "--run-folder", run)
    assert_refused(result, "loss", "nan", "lower --lr")
    assert not (run / "summary.json").exists()
