"""Resuming a run is exact, and a full disk or a bad checkpoint damages nothing."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import model
from experiment.metrics import Metrics, read_metrics
from tests.helpers.images import write_photos
from tests.helpers.runs import (
    SUMMARY,
    TINY,
    Command,
    assert_refused,
    at_step,
    ctrl_c,
    logged_steps,
    read_summary,
    same_weights,
    saved_step,
    weights_of,
)

# 20 steps of 40 images
OPTIONS = [
    *TINY,
    *("--epochs", "4"),
    *("--lr", "6"),
    *("--log-steps", "3"),
]


@pytest.fixture(scope="module")
def photos_with_bad_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, two of them bad. A resumed run must replace them by the same images."""
    folder = write_photos(tmp_path_factory.mktemp("photos_with_bad_ones"), 40, classes=1)
    for path in sorted(folder.rglob("*.jpg"))[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    return folder


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def test_resume_is_bit_exact(
    train: Command, photos_with_bad_ones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is stopped twice, each time between two lines of metrics.jsonl."""
    run = tmp_path / "run"
    uninterrupted = tmp_path / "uninterrupted"
    options = ["--data", photos_with_bad_ones, *OPTIONS]
    status, text = train(*options, "--checkpoint-minutes", "0", "--run-folder", uninterrupted)
    assert status == 0, text

    options += ["--checkpoint-minutes", "60", "--run-folder", run]
    at_step(monkeypatch, 7, ctrl_c)
    status, text = train(*options)
    assert status == 130, text
    assert "--resume" in text
    assert saved_step(run) == 8
    assert not (run / "summary.json").exists()

    at_step(monkeypatch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, text = train(*options, "--resume", "--threads", "1")
    assert status == 75, text
    # Lines of later steps, and half a line, which a run leaves that is killed between two saves.
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "loss": 0.0}\n{"step": 15, "loss": 0.0}\n{"step": 18, "lo')

    status, text = train(*options, "--resume")
    assert status == 0, text
    assert "resumed after step 14" in text
    assert same_weights(run, uninterrupted)
    assert logged_steps(run) == logged_steps(uninterrupted) == [0, 3, 6, 9, 12, 15, 18, 19]
    assert losses(run) == losses(uninterrupted)
    for name in ("loss_first", "loss_last", "steps"):
        assert read_summary(run)[name] == read_summary(uninterrupted)[name]


def test_resuming_a_finished_run_changes_no_weights(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--data", unlabelled, *OPTIONS, "--epochs", "1", "--run-folder", run]
    status, text = train(*options)
    assert status == 0, text
    weights = weights_of(run)
    summary = read_summary(run)

    status, text = train(*options, "--resume")
    assert status == 0, text
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(run).items())
    assert list(read_summary(run)) == SUMMARY
    assert read_summary(run)["loss_last"] == summary["loss_last"] == losses(run)[-1]


def test_a_block_wise_shuffle_is_resumed_with_the_same_blocks(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ["--data", unlabelled, *TINY, "--epochs", "2", "--lr", "6", "--log-steps", "1"]
    in_blocks = [*options, "--shuffle-block", "1"]
    for name, arguments in (("full shuffle", options), ("uninterrupted", in_blocks)):
        status, text = train(*arguments, "--run-folder", tmp_path / name)
        assert status == 0, text
    assert not same_weights(tmp_path / "full shuffle", tmp_path / "uninterrupted")

    at_step(monkeypatch, 6, ctrl_c)
    assert train(*in_blocks, "--run-folder", run)[0] == 130
    for other in (options, [*options, "--shuffle-block", "2"]):
        assert_refused(train(*other, "--run-folder", run, "--resume"), "shuffle_block: 1 saved")
    status, text = train(*in_blocks, "--run-folder", run, "--resume")
    assert status == 0, text
    assert same_weights(run, tmp_path / "uninterrupted")


@pytest.fixture
def stopped_run(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """The options of a run in tmp_path / "run" that was stopped after three of its ten steps."""
    options = ["--data", unlabelled, *TINY, "--epochs", "2", "--lr", "0.6", "--log-steps", "1"]
    options += ["--run-folder", tmp_path / "run"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, ctrl_c)
        assert train(*options)[0] == 130
    return options


def test_a_checkpoint_has_the_keys_of_earlier_versions_so_that_their_runs_can_be_resumed(
    stopped_run: list[object], tmp_path: Path
) -> None:
    """To rename a key, a reader of the old name has to be added."""
    state = model.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert set(state) == {
        *("step", "loss_first", "values", "fed", "highest", "settings"),
        *("model", "optimizer", "scaler"),
    }
    assert set(state["values"]) == {
        *("loss", "invariance", "redundancy", "diagonal_mean", "off_diagonal_rms"),
        *("feature_deviation", "effective_rank", "images_per_s", "data_wait_fraction"),
    }
    assert set(state["fed"]) == {"images", "wait_s", "elapsed_s"}
    assert set(state["highest"]) == {"feature_deviation", "effective_rank"}
    assert set(state["settings"]) == {
        *("hold_out", "shuffle_block", "size", "crop_area", "blur_p", "blur_sigma", "solarize_p"),
        *("backbone", "width", "small_stem", "projector", "lambd", "loss_scale"),
        *("epochs", "batch_size", "lr", "lr_biases", "weight_decay", "momentum", "eta", "clip_lr"),
        *("warmup_epochs", "warmup_start", "lr_end"),
        *("seed", "precision", "images", "fingerprint"),
    }


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint(
    train: Command, stopped_run: list[object], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    data = checkpoint.read_bytes()
    with file_size_limit(len(data) // 2):
        result = train(*stopped_run, "--resume")
    assert_refused(result, "checkpoint.pt", "File too large")
    assert checkpoint.read_bytes() == data
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    status, text = train(*stopped_run, "--resume")
    assert status == 0, text


def test_a_full_disk_leaves_the_metrics_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in range(1000)]
    path.write_text("".join(lines))
    with file_size_limit(len("".join(lines)) // 2), pytest.raises(OSError, match="too large"):
        Metrics(path, 900)
    assert path.read_text() == "".join(lines)

    with Metrics(path, 900) as metrics:
        metrics.write(900, {"loss": 1.5})
    assert path.read_text() == "".join(lines[:900]) + '{"step": 900, "loss": 1.5}\n'


def test_a_checkpoint_of_another_configuration_is_refused_with_the_differences(
    train: Command, stopped_run: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    files = contents(run)
    other_images = write_photos(tmp_path / "other", 48, classes=1)
    for options, words in (
        (("--lr", "0.123", "--size", "20"), ("lr: 0.6", "0.123", "size: 16", "20 now")),
        (("--data", other_images), ("images: 40", "48 now")),
        (("--width", "16"), ("width: 8", "16 now")),
    ):
        assert_refused(train(*stopped_run, "--resume", *options), *words)
    assert contents(run) == files


def test_the_place_of_a_run_and_how_it_is_executed_may_change(
    train: Command, stopped_run: list[object], tmp_path: Path
) -> None:
    shutil.move(tmp_path / "run", tmp_path / "moved")
    options = ["--run-folder", tmp_path / "moved", "--threads", "1", "--log-steps", "2"]
    status, text = train(*stopped_run, *options, "--resume")
    assert status == 0, text


def test_a_corrupt_checkpoint_is_refused_and_left_alone(
    train: Command, stopped_run: list[object], tmp_path: Path
) -> None:
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
        files = contents(tmp_path / "run")
        assert_refused(train(*stopped_run, "--resume"), str(checkpoint), "damaged")
        assert contents(tmp_path / "run") == files
    model.save_checkpoint(checkpoint, {"epoch": 3, "model": {}})
    assert_refused(train(*stopped_run, "--resume"), str(checkpoint))
