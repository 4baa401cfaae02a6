"""Options that must not change the weights, resuming with changes, and kept checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import model
from experiment.metrics import read_metrics
from tests.helpers.runs import (
    TINY,
    Command,
    assert_refused,
    at_step,
    ctrl_c,
    logged_steps,
    same_weights,
)

OPTIONS = [*TINY, "--epochs", "2", "--lr", "6", "--log-steps", "1"]  # 10 steps of 40 images


@pytest.fixture
def undo_deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("undo_deterministic")
def test_options_about_how_a_run_is_executed_change_no_bit_of_the_weights(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    """On labelled images, so that --eval-epochs has something to test."""
    options_of_run: dict[str, list[str]] = {
        "plain": [],
        "tested": ["--eval-epochs", "1"],
        "recomputed": ["--recompute"],
        "saved": ["--checkpoint-minutes", "0", "--threads", "1"],
        "deterministic": ["--deterministic"],
        "deterministic again": ["--deterministic"],
    }
    for name, options in options_of_run.items():
        status, text = train("--data", photos, *OPTIONS, *options, "--run-folder", tmp_path / name)
        assert status == 0, text
    assert torch.are_deterministic_algorithms_enabled()

    expected = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    epoch_ends = [5, 11]  # 54 of the 60 images are trained on
    assert len(expected) == 12
    for name in options_of_run:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert same_weights(tmp_path / name, tmp_path / "plain"), name
        assert [row["loss"] for row in rows] == [row["loss"] for row in expected], name
        tested_steps = [row["step"] for row in rows if "knn_top1" in row]
        assert tested_steps == (epoch_ends if name == "tested" else []), name


@pytest.fixture
def stopped_run(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """The options of a run in tmp_path / "run" that was stopped after four of its ten steps."""
    options = ["--data", unlabelled, *OPTIONS, "--run-folder", tmp_path / "run"]
    with monkeypatch.context() as patch:
        at_step(patch, 3, ctrl_c)
        assert train(*options)[0] == 130
    return options


def test_a_changed_configuration_is_refused_until_it_is_accepted(
    train: Command, stopped_run: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changed = [*stopped_run, "--resume", "--lr", "3", "--epochs", "3"]
    checkpoint = (run / "checkpoint.pt").read_bytes()
    assert_refused(train(*changed), "epochs: 2", "3 now", "lr: 6.0", "3.0 now", "--accept-changes")
    assert_refused(
        train(*changed, "--accept-changes", "--width", "16"),
        "checkpoint.pt does not fit this configuration",
    )
    assert (run / "checkpoint.pt").read_bytes() == checkpoint

    status, text = train(*changed, "--accept-changes")
    assert status == 0, text
    assert text.count("changed setting: ") == 2
    assert "changed setting: lr: 6.0" in text
    assert "changed setting: epochs: 2" in text
    assert logged_steps(run) == list(range(15))
    rates = [row["lr"] for row in read_metrics(run / "metrics.jsonl")]
    # The fourth step of the warm-up, and the fifth with half the peak.
    assert rates[4] == pytest.approx(rates[3] / 3 * 4 / 2)

    status, text = train(*changed)
    assert status == 0, "the changed configuration is now the saved one"


def test_resume_if_saved_resumes_only_if_there_is_a_checkpoint(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ["--data", unlabelled, *OPTIONS]
    resumable = [*options, "--resume-if-saved", "--run-folder", run]
    status, text = train(*options, "--run-folder", tmp_path / "uninterrupted")
    assert status == 0, text

    # A run that was killed before its first save.
    run.mkdir()
    (run / "config.json").write_text("{}")
    at_step(monkeypatch, 3, ctrl_c)
    status, text = train(*resumable)
    assert status == 130
    assert f"the run that was in {run} is now in {run}.1" in text

    at_step(monkeypatch, 7, ctrl_c)
    status, text = train(*resumable)
    assert status == 130
    assert "resumed after step 4" in text

    # A run that was killed between the two renames of a save.
    (run / "checkpoint.pt").rename(run / "checkpoint-00000004.pt")
    status, text = train(*resumable)
    assert status == 0, text
    assert "resumed after step 8" in text
    assert same_weights(run, tmp_path / "uninterrupted")
    assert logged_steps(run) == list(range(10))

    assert_refused(
        train(*options, "--run-folder", tmp_path / "new", "--resume"), "nothing to resume from"
    )


@pytest.mark.parametrize(
    ("options", "kept_steps"),
    [
        (("--keep-checkpoints", "1"), [10]),
        (("--keep-checkpoints", "3"), [8, 9, 10]),
        (("--keep-checkpoints", "2", "--milestone-epochs", "1", "--epochs", "3"), [5, 10, 14, 15]),
        (
            ("--checkpoint-minutes", "60", "--keep-checkpoints", "1", "--milestone-epochs", "1"),
            [5, 10],
        ),
    ],
)
def test_the_last_checkpoints_and_the_milestones_are_kept(
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    kept_steps: list[int],
) -> None:
    run = tmp_path / "run"
    arguments = [*OPTIONS, "--checkpoint-minutes", "0", *options, "--run-folder", run]
    status, text = train("--data", unlabelled, *arguments)
    assert status == 0, text
    names = [f"checkpoint-{step:08d}.pt" for step in kept_steps[:-1]] + ["checkpoint.pt"]
    assert sorted(path.name for path in run.glob("checkpoint*")) == names
    assert [model.load_checkpoint(run / name)["step"] for name in names] == kept_steps


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    uninterrupted = tmp_path / "uninterrupted"
    options = ["--data", unlabelled, *OPTIONS, "--checkpoint-minutes", "0"]
    status, text = train(*options, "--run-folder", uninterrupted)
    assert status == 0, text
    at_step(monkeypatch, 6, ctrl_c)
    assert train(*options, "--run-folder", run)[0] == 130

    newest = run / "checkpoint.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 1
    newest.write_bytes(data)
    status, text = train(*options, "--run-folder", run, "--resume")
    assert status == 0, text
    assert f"{newest} is damaged" in text
    assert f"{run}/checkpoint-00000006.pt (step 6) is used instead" in text
    assert "resumed after step 6" in text
    assert same_weights(run, uninterrupted)
    assert logged_steps(run) == list(range(10))
    names = {path.name for path in run.glob("*.pt")}
    assert names == {path.name for path in uninterrupted.glob("*.pt")}
