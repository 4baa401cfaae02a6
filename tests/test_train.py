"""The verb train.py as a user meets it: what it writes, what it says, what it refuses, and that it can be killed."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import encoded, picture, write_photos
from PIL import Image

import model
import pipeline
import presets
from pipeline import machine
from runlog import Metrics, claim

TRAIN = Path(__file__).parent.parent / "train.py"
TINY = ["--device", "cpu", "--size", "16", "--width", "8", "--projector", "32-32-32", "--batch-size", "8"]
SUMMARY = [
    *("preset", "device", "decoder", "backbone", "steps", "images_per_s", "data_wait_fraction"),
    *("loss_first", "loss_last"),
    *("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained"),
    *("checkpoint", "export"),
]

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Train]:
    """`train.py` in this process, from an empty folder: (exit status, everything it said)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        status: Any = 0
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        text = said.out + said.err + (f"{status}\n" if isinstance(status, str) else "")
        assert "Traceback" not in text
        return 1 if isinstance(status, str) else status, text

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs without labels: five steps of eight an epoch."""
    folder = tmp_path_factory.mktemp("flat")
    write_photos(folder, 40, classes=1)
    return folder


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of a step of the next run."""
    schedule, done = model.learning_rate_factor, []

    def factor(now: int, *rest: Any, **named: Any) -> float:
        if now == step and not done:
            done.append(action())
        return schedule(now, *rest, **named)

    monkeypatch.setattr(model, "learning_rate_factor", factor)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# ── what it writes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_leaves_nothing_behind(
    train: Train, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cwd"))
    before = sorted(flat.rglob("*"))
    status, text = train("--data", flat, *TINY, "--dry-run")
    assert status == 0, text
    assert "this configuration runs" in text
    assert list(Path.cwd().iterdir()) == []
    assert sorted(flat.rglob("*")) == before


def test_a_labelled_folder_gives_a_summary_with_four_knn_scores(train: Train, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, text = train("--data", photos, *TINY, "--run", run, "--epochs", "2", "--log-steps", "5")
    assert status == 0, text
    summary = summary_of(run)
    assert list(summary) == SUMMARY
    assert (summary["preset"], summary["backbone"], summary["decoder"]) == ("demo", "resnet18", "torchvision")
    assert all(0 <= summary[name] <= 100 for name in SUMMARY if name.startswith("knn"))
    assert summary["steps"] == 2 * (54 // 8), "a tenth of the 60 is held out"
    assert summary["images_per_s"] > 0
    assert 0 <= summary["data_wait_fraction"] < 1
    assert steps_of(run) == [0, 5, 10, 11]
    first, *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert (summary["loss_first"], summary["loss_last"]) == (first["loss"], last["loss"])
    assert torch.load(summary["checkpoint"], weights_only=True)["step"] == summary["steps"]
    exported = model.build_backbone("resnet18", 8)
    exported.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))
    assert summary["export"] == str(run / "backbone.safetensors")
    assert sorted(path.name for path in run.iterdir()) == [
        *(".lock", "backbone.pth", "backbone.safetensors", "checkpoint.pt"),
        *("config.json", "metrics.jsonl", "summary.json", "views.png"),
    ]
    assert list(Path.cwd().iterdir()) == []


def test_scores_are_those_of_the_exported_weights(train: Train, photos: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "splits"
    for split, parity in (("train", 0), ("val", 1)):
        for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
            if i % 2 == parity:
                (folder / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / split / path.parent.name)
    status, text = train("--data", folder, *TINY, "--run", run, "--epochs", "4", "--lr", "6")
    assert status == 0, text
    assert json.loads((run / "config.json").read_text())["images"] == 30, "val/ is not trained on, nor a class"
    backbone = model.build_backbone("resnet18", 8).eval()
    backbone.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))
    splits = [
        pipeline.open_loader(
            pipeline.open_store(folder / split), pipeline.center_view(16), batch_size=7, shuffle=False
        ).epoch(0)
        for split in ("train", "val")
    ]
    expected = model.knn_accuracies(*splits, {"trained": backbone, "pixels": model.pixel_feature})
    found = summary_of(run)
    assert found["knn_top1_trained"] == pytest.approx(expected["trained"])
    assert found["knn_top1_pixels"] == pytest.approx(expected["pixels"])


def test_a_folder_without_labels_trains_without_scores_and_an_earlier_run_is_kept(
    train: Train, flat: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for moved in (None, "run.1", "run.2"):
        status, text = train("--data", flat, *TINY, "--run", run, "--epochs", "1")
        assert status == 0, text
        assert [summary_of(run)[name] for name in SUMMARY if name.startswith("knn")] == [None] * 4
        if moved:
            assert str(tmp_path / moved) in text
            assert (tmp_path / moved / "mark").read_text() == f"before {moved}"
            assert summary_of(tmp_path / moved)["checkpoint"] == str(run / "checkpoint.pt")
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


def test_odd_images_are_trained_on_or_reported_and_the_rest_goes_on(train: Train, tmp_path: Path) -> None:
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
    status, text = train("--data", folder, *TINY, "--run", run, "--epochs", "6", "--log-steps", "1")
    assert status == 0, text
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
    assert summary_of(run)["steps"] == 30
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["bad_images"] == 1


def test_an_image_that_turns_bad_is_replaced_counted_and_said(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_photos(tmp_path / "photos", 40, classes=1), tmp_path / "run"
    victim = sorted(folder.rglob("*.jpg"))[7]
    at_step(monkeypatch, 3, lambda: victim.write_bytes(b"\xff\xd8 overwritten"))
    status, text = train("--data", folder, *TINY, "--run", run, "--epochs", "4", "--log-steps", "1")
    assert status == 0, text
    assert [str(victim) in line for line in text.splitlines() if "replaced" in line] == [True]
    counts = [json.loads(line)["bad_images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], len(counts)) == (0, 1, 20)


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


def refused(result: tuple[int, str], *words: str) -> None:
    """A non-zero exit status, and one line that names what is wrong and what to do."""
    status, text = result
    assert status not in (0, 130), text
    lines = text.strip().splitlines()
    (error,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert error == len(lines) - 1, text
    assert not [word for word in words if word not in lines[-1]], text


def unusable(folder: Path) -> Path:
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(b"no image")
    return folder


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda folder: folder.rmdir(), ("data", "not there", "name a folder of images")),
    "empty": (lambda folder: None, ("data", "no image", ".jpg", ".png")),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("")), ("data", "no folder", "name a folder")),
    "unreadable": (unusable, ("data", "none of its 10 images", "0.jpg")),
    "too few": (lambda folder: write_photos(folder, 5, classes=1), ("5 images", "batch of 8", "at most 5")),
}


@pytest.mark.parametrize("kind", list(BAD_FOLDERS))
def test_folders_without_enough_images_are_refused(train: Train, tmp_path: Path, kind: str) -> None:
    make, words = BAD_FOLDERS[kind]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    refused(train("--data", tmp_path / "data", *TINY, "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "--batch-size 0": ("--batch-size", "0", "at least"),
    "--batch-size 1": ("--batch-size", "1", "at least 2"),
    "--epochs 0": ("--epochs", "0", "at least 1"),
    "--size 0": ("--size", "0", "at least 1"),
    "--hold-out 1": ("--hold-out", "1", "between"),
    "--crop-area 0.5 0.1": ("--crop-area", "0.5", "range"),
    "--log-steps 0": ("--log-steps", "at least 1"),
    "--threads 0": ("--threads", "0", "at least 1"),
    "--projector 32-x": ("projector", "32-x", "8192-8192-8192"),
    "--width 0": ("width", "0", "at least 1"),
    "--device cuda": ("GPU", "driver", "--device cpu"),
    "--device tpu": ("tpu", "cpu", "cuda"),
    "--resume": ("checkpoint.pt", "nothing to resume"),
}


@pytest.mark.parametrize("options", list(BAD_OPTIONS))
def test_impossible_options_are_refused(
    train: Train, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    refused(train("--data", flat, *TINY, "--run", run, *options.split()), *BAD_OPTIONS[options])
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
    train: Train, arguments: str, words: tuple[str, ...]
) -> None:
    status, text = train(*arguments.split())
    assert status not in (0, 130)
    assert not [word for word in words if word not in text], text
    assert list(Path.cwd().iterdir()) == []


def test_a_preset_of_somebody_elses_images_asks_for_them(train: Train) -> None:
    refused(train("imagenet-1000e", "--device", "cpu"), "imagenet-1000e", "--data DIR")
    assert list(Path.cwd().iterdir()) == []


def test_a_gpu_that_torch_cannot_use_is_an_error_and_never_silently_the_cpu(
    train: Train, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    places = {"/dev": tmp_path / "dev", "/proc/driver/nvidia/gpus": tmp_path / "none"}
    monkeypatch.setattr(machine, "Path", lambda path: places[path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tiny = TINY[2:]  # without --device cpu
    refused(train("--data", flat, *tiny, "--run", tmp_path / "run"), "GPU", "driver", "--device cpu")
    assert not (tmp_path / "run").exists()
    assert machine.find_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.find_device("auto").type == "cpu", "an empty list of GPUs is a choice"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "dev" / "nvidia0").unlink()
    assert machine.find_device("auto").type == "cpu", "no GPU in the machine"


def test_a_run_folder_that_cannot_be_written_is_named(train: Train, flat: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(train("--data", flat, *TINY, "--run", tmp_path / "file" / "run"), str(tmp_path / "file"))
    refused(train("--data", flat, *TINY, "--run", tmp_path / "file"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_loss_that_is_no_number_ends_the_run(train: Train, flat: Path, tmp_path: Path) -> None:
    options = ["--lr", "1e30", "--lr-biases", "1e30", "--warmup-epochs", "0", "--log-steps", "1"]
    refused(train("--data", flat, *TINY, "--run", tmp_path / "run", *options), "loss", "nan", "lower --lr")
    assert not (tmp_path / "run" / "summary.json").exists()


# ── stop and go on ───────────────────────────────────────────────────────────────────────────────────────────────────

LONG = ["--epochs", "4", "--log-steps", "3", "--checkpoint-minutes", "0", "--lr", "6"]  # 20 steps


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs, two of which do not decode: what stands in for them must be the same after a resume."""
    folder = write_photos(tmp_path_factory.mktemp("damaged"), 40, classes=1)
    for path in sorted(folder.rglob("*.jpg"))[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    return folder


@pytest.fixture
def whole(train: Train, damaged: Path, tmp_path: Path) -> Path:
    """A run that nothing interrupted."""
    status, text = train("--data", damaged, *TINY, *LONG, "--run", tmp_path / "whole")
    assert status == 0, text
    return tmp_path / "whole"


def test_ctrl_c_saves_and_a_resumed_run_ends_to_the_bit_where_it_would_have(
    train: Train, damaged: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice between two lines of metrics.jsonl, with lines in it that are later than the checkpoint."""
    run, later = tmp_path / "run", [*LONG, "--checkpoint-minutes", "60"]
    at_step(monkeypatch, 7, ctrl_c)
    status, text = train("--data", damaged, *TINY, *later, "--run", run)
    assert status == 130, text
    assert "--resume" in text
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 8
    assert not (run / "summary.json").exists()
    at_step(monkeypatch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train("--data", damaged, *TINY, *later, "--run", run, "--resume", "--threads", "1")[0] == 130
    with open(run / "metrics.jsonl", "a") as file:  # as a run leaves it that is killed between two saves
        file.write('{"step": 14, "loss": 0.0}\n{"step": 15, "loss": 0.0}\n{"step": 18, "lo')
    status, text = train("--data", damaged, *TINY, *later, "--run", run, "--resume")
    assert status == 0, text
    assert "resumed after step 14" in text
    assert same_weights(run, whole)
    assert steps_of(run) == steps_of(whole) == [0, 3, 6, 9, 12, 15, 18, 19]
    losses = [[json.loads(x)["loss"] for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole)]
    assert losses[0] == losses[1]
    assert [summary_of(run)[name] for name in ("loss_first", "loss_last", "steps")] == [
        summary_of(whole)[name] for name in ("loss_first", "loss_last", "steps")
    ]
    before = weights_of(run)
    status, text = train("--data", damaged, *TINY, *later, "--run", run, "--resume")
    assert status == 0, text
    assert all(torch.equal(value, before[name]) for name, value in weights_of(run).items()), "it was finished"
    assert list(summary_of(run)) == SUMMARY
    assert summary_of(run)["loss_last"] == losses[1][-1]


def test_ctrl_c_outside_the_loop_ends_quietly(
    train: Train, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_store", lambda *_: ctrl_c())
    assert train("--data", flat, *TINY, "--run", tmp_path / "run")[0] == 130
    assert not (tmp_path / "run").exists()


def killed(run: Path, options: list[str], after_s: float) -> bool:
    """Start train.py, and SIGKILL it that long after its first new checkpoint. False where it had ended by then."""
    checkpoint = run / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen([sys.executable, str(TRAIN), *options, "--run", str(run)], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(after_s)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


def loop_s(run: Path) -> float:
    """How long the training loop of a finished run took, so that kills fall into it on any machine."""
    summary = summary_of(run)
    return summary["steps"] * 8 / summary["images_per_s"]


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(
    train: Train, damaged: Path, whole: Path, tmp_path: Path
) -> None:
    after_s = random.uniform(0, 0.5) * loop_s(whole)
    options = ["--data", str(damaged), *TINY, *LONG]
    assert killed(tmp_path / "run", options, after_s), f"the run was over {after_s} s after its first checkpoint"
    assert 1 <= torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 20
    status, text = train(*options, "--run", tmp_path / "run", "--resume")
    assert status == 0, text
    assert same_weights(tmp_path / "run", whole), f"killed {after_s} s after the first checkpoint"
    assert steps_of(tmp_path / "run") == steps_of(whole)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_to_the_same_bits(train: Train, damaged: Path, tmp_path: Path) -> None:
    options = ["--data", str(damaged), *TINY, *LONG, "--epochs", "60"]
    status, text = train(*options, "--run", tmp_path / "whole")
    assert status == 0, text
    run, kills = tmp_path / "run", 0
    for i in range(10):
        kills += killed(run, options + ["--resume"] * (i > 0), random.uniform(0, 0.08) * loop_s(tmp_path / "whole"))
    assert kills == 10, "each hit a run that was going on"
    status, text = train(*options, "--run", run, "--resume")
    assert status == 0, text
    assert same_weights(run, tmp_path / "whole")
    assert steps_of(run) == steps_of(tmp_path / "whole")
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture
def stopped(train: Train, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The options of a run that was stopped after three of its ten steps, in tmp_path / "run"."""
    options = ["--data", flat, *TINY, "--epochs", "2", "--lr", "0.6", "--log-steps", "1", "--run", tmp_path / "run"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, ctrl_c)
        assert train(*options)[0] == 130
    return options


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A full disk, by a limit on the size of files: writing more fails just so, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_last_checkpoint(train: Train, stopped: list[object], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with files_of_at_most(len(before) // 2):
        result = train(*stopped, "--resume")
    refused(result, "checkpoint.pt", "File too large")
    assert checkpoint.read_bytes() == before
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    status, text = train(*stopped, "--resume")
    assert status == 0, text


def test_a_full_disk_leaves_the_metrics_of_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := "".join(f'{{"step": {step}}}\n' for step in range(1000)))
    with files_of_at_most(len(before) // 2), pytest.raises(OSError, match="too large"):
        Metrics(path, 900)
    assert path.read_text() == before
    with Metrics(path, 900) as metrics:
        metrics.write(step=900, loss=1.5)
    assert path.read_text() == before[: before.index('{"step": 900}')] + '{"step": 900, "loss": 1.5}\n'


def test_a_checkpoint_of_another_configuration_is_refused_by_name(
    train: Train, stopped: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    before = contents(run)
    refused(train(*stopped, "--resume", "--lr", "0.123", "--size", "20"), "lr: 0.6", "0.123", "size: 16", "20 now")
    other = write_photos(tmp_path / "other", 48, classes=1)
    refused(train(*stopped, "--resume", "--data", other), "images: 40", "48 now")
    refused(train(*stopped, "--resume", "--width", "16"), "width: 8", "16 now")
    assert contents(run) == before
    shutil.move(run, tmp_path / "moved")
    status, text = train(*stopped, "--run", tmp_path / "moved", "--resume", "--threads", "1", "--log-steps", "2")
    assert status == 0, text  # where it lies and how it is run are no part of the configuration


def test_a_corrupt_checkpoint_is_refused_and_left_alone(train: Train, stopped: list[object], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()
    middle = len(good) // 2
    foreign = io.BytesIO()
    torch.save({"epoch": 3, "model": {}}, foreign)
    for data in (
        good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :],
        good[:middle],
        b"",
        foreign.getvalue(),
    ):
        checkpoint.write_bytes(data)
        before = contents(tmp_path / "run")
        refused(train(*stopped, "--resume"), str(checkpoint), "damaged")
        assert contents(tmp_path / "run") == before
    model.save_checkpoint(checkpoint, {"epoch": 3, "model": {}})
    refused(train(*stopped, "--resume"), str(checkpoint))


# ── presets and help ─────────────────────────────────────────────────────────────────────────────────────────────────

# W, the authors' number of GPUs, divides what LARS does not adapt: its rate, or the loss (protocols.md, trap 1).
PUBLISHED: dict[str, dict[str, object]] = {
    "imagenet-1000e": {
        **{"batch_size": 2048, "epochs": 1000, "lr": 0.2, "lr_biases": 0.0048 / 32, "loss_scale": 1.0},
        **{"weight_decay": 1.5e-6, "lambd": 5e-3, "eta": 0.001, "momentum": 0.9, "clip_lr": False},
        **{"projector": "8192-8192-8192", "backbone": "resnet50", "warmup_epochs": 10, "lr_end": 0.001},
        **{"size": 224, "crop_area": (0.08, 1.0), "blur_p": (1.0, 0.1), "solarize_p": (0.0, 0.2), "width": 64},
    },
    "imagenet-300e": {
        **{"batch_size": 8 * 256, "epochs": 300, "lr": 1.6 / 8, "lr_biases": 1.6 / 8 * 0.024 / 8, "loss_scale": 1.0},
        **{"weight_decay": 1e-6, "lambd": 0.0051, "eta": 0.001, "clip_lr": False, "projector": "8192-8192-8192"},
        **{"backbone": "resnet50", "warmup_epochs": 10, "warmup_start": 1.6e-4, "lr_end": 0.0016 / 1.6},
    },
    "imagenet-100e": {
        **{"batch_size": 4 * 64, "epochs": 100, "lr": 0.8, "lr_biases": 0.8, "loss_scale": 0.048 / 4},
        **{"weight_decay": 1.5e-6, "projector": "4096-4096-4096", "backbone": "resnet50", "warmup_start": 3e-5 / 0.8},
    },
    "imagenet100-400e": {
        **{"batch_size": 2 * 128, "epochs": 400, "lr": 0.3, "lr_biases": 0.3, "loss_scale": 0.1 / 2},
        **{"weight_decay": 1e-4, "eta": 0.02, "clip_lr": True, "projector": "2048-2048-2048", "backbone": "resnet18"},
        **{"warmup_start": 3e-5 / 0.3, "size": 224, "small_stem": False},
    },
    "cifar10-1000e": {
        **{"batch_size": 256, "epochs": 1000, "lr": 0.3, "lr_biases": 0.3, "loss_scale": 0.1, "weight_decay": 1e-4},
        **{"eta": 0.02, "clip_lr": True, "projector": "2048-2048-2048", "backbone": "resnet18"},
        **{"small_stem": True, "size": 32, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.2)},
    },
}


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_a_preset_is_found_by_name_and_has_the_published_values(name: str) -> None:
    found, config = presets.parse([name, "--data", "photos", "--seed", "5"])
    assert (found, config.data.data, config.run.seed) == (name, Path("photos"), 5)
    config.check()
    values = vars(config.data) | vars(config.model) | vars(config.optim)
    expected = PUBLISHED.get(name, {"size": 48})
    assert {key: values[key] for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }


def test_every_published_preset_is_checked() -> None:
    assert PUBLISHED.keys() | {"demo"} == presets.PRESETS.keys()


@pytest.mark.parametrize(
    ("arguments", "name", "batch_size"),
    [
        ("", "demo", 128),
        ("--data photos", "demo", 128),
        ("imagenet-100e --data demo", "imagenet-100e", 256),
        ("--data imagenet-100e", "demo", 128),
        ("--run imagenet-300e --data x --batch-size 64", "demo", 64),
        ("imagenet-300e --data x --batch-size 64", "imagenet-300e", 64),
    ],
)
def test_without_a_name_it_is_the_demo_whatever_the_folders_are_called(
    arguments: str, name: str, batch_size: int
) -> None:
    found, config = presets.parse(arguments.split())
    assert (found, config.optim.batch_size) == (name, batch_size)


def test_choices_on_the_command_line_are_those_of_the_rooms() -> None:
    def choices(config: type, field: str) -> tuple[str, ...]:
        return get_args(get_type_hints(config)[field])

    assert choices(presets.ModelConfig, "backbone") == tuple(model.BACKBONES)
    assert choices(presets.RunConfig, "decoder") == ("auto", *pipeline.DECODERS)


def test_settings_hold_all_that_decides_what_is_learned() -> None:
    """Everything but where the data lie and how the run is run."""
    config = presets.PRESETS["demo"]()
    fields = vars(config.data).keys() | vars(config.model).keys() | vars(config.optim).keys()
    assert config.settings().keys() == fields - {"data"} | {"seed", "precision"}
    assert json.loads(json.dumps(config.settings())) == config.settings()


def test_help_is_there_in_two_seconds_and_without_torch() -> None:
    code = (
        "import atexit, runpy, sys; sys.argv = ['train.py', '--help'];"
        "atexit.register(lambda: print('loaded', sorted({'torch', 'torchvision', 'numpy'} & sys.modules.keys())));"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], cwd=TRAIN.parent, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("loaded []\n")
    assert all(f"--{option}" in result.stdout for option in ("data", "epochs", "lambd", "device", "resume"))
    assert "pixels" in result.stdout, "units"
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 2, "of processor time, which other work on the machine does not lengthen"


def test_two_runs_cannot_share_a_folder(train: Train, flat: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", flat, *TINY, "--run", run, "--epochs", "1")
    assert train(*options)[0] == 0
    with claim(run):
        for again in (options, (*options, "--resume")):
            status, text = train(*again)
            assert status == 1
            assert "still going on" in text
    assert (run / "summary.json").exists()
    assert not (tmp_path / "run.1").exists()


def test_a_folder_that_is_no_run_is_left_alone(train: Train, flat: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for run, complaint in (("mine", "something else than a run"), ("mine/thesis.tex", "is a file")):
        status, text = train("--data", flat, *TINY, "--run", tmp_path / run)
        assert status == 1
        assert complaint in text
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_test_split_of_which_nothing_decodes_costs_the_scores_alone(
    train: Train, photos: Path, tmp_path: Path
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
    summary = summary_of(tmp_path / "run")
    assert summary["knn_top1_trained"] is None
    assert Path(summary["export"]).exists()


def test_the_picture_shows_images_that_decode(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    store = pipeline.open_store(tmp_path / "data")
    recipe = pipeline.barlow_twins(32)
    whole = pipeline.view_picture(store, recipe)
    assert whole is not None
    assert whole.size == (8 * (96 + 4) + 4, 3 * (96 + 4) + 4)
    for sample in pipeline.loader.epoch_order(len(store), 0, 0)[3:]:
        Path(store.name(int(sample))).write_bytes(b"")
    three = pipeline.view_picture(store, recipe)
    assert three is not None
    assert three.width == 3 * (96 + 4) + 4
    for sample in range(len(store)):
        Path(store.name(sample)).write_bytes(b"")
    assert pipeline.view_picture(store, recipe) is None


def test_a_run_goes_on_when_nobody_reads_what_it_says() -> None:
    code = "import time, sys\nfrom runlog import RunLog\nwith RunLog() as log:\n"
    code += "    for i in range(50): log.say(str(i)); time.sleep(0.01)\n    print('trained', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=TRAIN.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read() == "trained\n"
    assert process.wait() == 0
