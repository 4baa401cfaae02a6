"""Stop and go on: Ctrl-C, kills, full disks, and checkpoints that are not to be trusted."""

from __future__ import annotations

import io
import json
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
import pipeline
from experiment.metrics import Metrics
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
    weights_of,
)

LONG = ["--epochs", "4", "--log-steps", "3", "--checkpoint-minutes", "0", "--lr", "6"]  # 20 steps


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs, two of which do not decode: what stands in for them must be the same after a resume."""
    folder = write_photos(tmp_path_factory.mktemp("damaged"), 40, classes=1)
    for path in sorted(folder.rglob("*.jpg"))[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    return folder


@pytest.fixture
def whole(train: Command, damaged: Path, tmp_path: Path) -> Path:
    """A run that nothing interrupted."""
    status, text = train("--data", damaged, *TINY, *LONG, "--run", tmp_path / "whole")
    assert status == 0, text
    return tmp_path / "whole"


def test_ctrl_c_saves_and_a_resumed_run_ends_to_the_bit_where_it_would_have(
    train: Command, damaged: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert (
        train("--data", damaged, *TINY, *later, "--run", run, "--resume", "--threads", "1")[0] == 75
    )
    with open(
        run / "metrics.jsonl", "a"
    ) as file:  # as a run leaves it that is killed between two saves
        file.write('{"step": 14, "loss": 0.0}\n{"step": 15, "loss": 0.0}\n{"step": 18, "lo')
    status, text = train("--data", damaged, *TINY, *later, "--run", run, "--resume")
    assert status == 0, text
    assert "resumed after step 14" in text
    assert same_weights(run, whole)
    assert logged_steps(run) == logged_steps(whole) == [0, 3, 6, 9, 12, 15, 18, 19]
    losses = [
        [json.loads(x)["loss"] for x in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (run, whole)
    ]
    assert losses[0] == losses[1]
    assert [read_summary(run)[name] for name in ("loss_first", "loss_last", "steps")] == [
        read_summary(whole)[name] for name in ("loss_first", "loss_last", "steps")
    ]
    before = weights_of(run)
    status, text = train("--data", damaged, *TINY, *later, "--run", run, "--resume")
    assert status == 0, text
    assert all(torch.equal(value, before[name]) for name, value in weights_of(run).items()), (
        "it was finished"
    )
    assert list(read_summary(run)) == SUMMARY
    assert read_summary(run)["loss_last"] == losses[1][-1]


def test_a_run_in_blocks_goes_on_in_its_blocks(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", unlabelled, *TINY, "--epochs", "2", "--lr", "6", "--log-steps", "1"]
    blocks = [*options, "--shuffle-block", "1"]
    for run, these in (("plain", options), ("whole", blocks)):
        status, text = train(*these, "--run", tmp_path / run)
        assert status == 0, text
    assert not same_weights(tmp_path / "plain", tmp_path / "whole")
    at_step(monkeypatch, 6, ctrl_c)
    assert train(*blocks, "--run", tmp_path / "run")[0] == 130
    for other in (options, [*options, "--shuffle-block", "2"]):
        assert_refused(
            train(*other, "--run", tmp_path / "run", "--resume"), "shuffle_block: 1 saved"
        )
    status, text = train(*blocks, "--run", tmp_path / "run", "--resume")
    assert status == 0, text
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_outside_the_loop_ends_quietly(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_store", lambda *_: ctrl_c())
    assert train("--data", unlabelled, *TINY, "--run", tmp_path / "run")[0] == 130
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """The options of a run that was stopped after three of its ten steps, in tmp_path / "run"."""
    options = [
        "--data",
        unlabelled,
        *TINY,
        "--epochs",
        "2",
        "--lr",
        "0.6",
        "--log-steps",
        "1",
        "--run",
        tmp_path / "run",
    ]
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
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint(
    train: Command, stopped: list[object], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with files_of_at_most(len(before) // 2):
        result = train(*stopped, "--resume")
    assert_refused(result, "checkpoint.pt", "File too large")
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
    assert (
        path.read_text() == before[: before.index('{"step": 900}')] + '{"step": 900, "loss": 1.5}\n'
    )


def test_a_checkpoint_of_another_configuration_is_refused_by_name(
    train: Command, stopped: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    before = contents(run)
    assert_refused(
        train(*stopped, "--resume", "--lr", "0.123", "--size", "20"),
        "lr: 0.6",
        "0.123",
        "size: 16",
        "20 now",
    )
    other = write_photos(tmp_path / "other", 48, classes=1)
    assert_refused(train(*stopped, "--resume", "--data", other), "images: 40", "48 now")
    assert_refused(train(*stopped, "--resume", "--width", "16"), "width: 8", "16 now")
    assert contents(run) == before
    shutil.move(run, tmp_path / "moved")
    status, text = train(
        *stopped, "--run", tmp_path / "moved", "--resume", "--threads", "1", "--log-steps", "2"
    )
    assert status == 0, text  # where it lies and how it is run are no part of the configuration


def test_a_corrupt_checkpoint_is_refused_and_left_alone(
    train: Command, stopped: list[object], tmp_path: Path
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
        before = contents(tmp_path / "run")
        assert_refused(train(*stopped, "--resume"), str(checkpoint), "damaged")
        assert contents(tmp_path / "run") == before
    model.save_checkpoint(checkpoint, {"epoch": 3, "model": {}})
    assert_refused(train(*stopped, "--resume"), str(checkpoint))
