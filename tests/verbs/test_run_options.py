"""What the options of a run change, and what they must not: the weights, and which files are there at the end."""

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

OPTIONS = [*TINY, "--epochs", "2", "--lr", "6", "--log-steps", "1"]  # 10 steps of `unlabelled`


@pytest.fixture
def usual_arithmetic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("usual_arithmetic")
def test_options_that_are_about_how_it_runs_leave_every_bit_of_what_is_learned(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    """Labelled images, for --eval-epochs: of sixty, six are held out, which leaves six steps an epoch."""
    runs: dict[str, list[str]] = {
        "plain": [],
        "tested": ["--eval-epochs", "1"],
        "recomputed": ["--recompute"],
        "saved": ["--checkpoint-minutes", "0", "--threads", "1"],
        "deterministic": ["--deterministic"],
        "deterministic again": ["--deterministic"],
    }
    for name, options in runs.items():
        status, text = train("--data", photos, *OPTIONS, *options, "--run", tmp_path / name)
        assert status == 0, text
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in runs}
    for name in runs:
        assert same_weights(tmp_path / name, tmp_path / "plain"), name
        assert [line["loss"] for line in lines[name]] == [
            line["loss"] for line in lines["plain"]
        ], name
    steps = len(lines["plain"])
    tests = {name: [line["step"] for line in lines[name] if "knn_top1" in line] for name in runs}
    assert tests == {name: [steps // 2 - 1, steps - 1] if name == "tested" else [] for name in runs}
    assert torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def stopped(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """The options of a run that was stopped after four of its ten steps, in tmp_path / "run"."""
    options = ["--data", unlabelled, *OPTIONS, "--run", tmp_path / "run"]
    with monkeypatch.context() as patch:
        at_step(patch, 3, ctrl_c)
        assert train(*options)[0] == 130
    return options


def test_changes_are_refused_until_they_are_accepted_and_then_said(
    train: Command, stopped: list[object], tmp_path: Path
) -> None:
    run, changed = tmp_path / "run", [*stopped, "--resume", "--lr", "3", "--epochs", "3"]
    before = (run / "checkpoint.pt").read_bytes()
    assert_refused(train(*changed), "epochs: 2", "3 now", "lr: 6.0", "3.0 now", "--accept-changes")
    assert_refused(
        train(*changed, "--accept-changes", "--width", "16"),
        "checkpoint.pt does not fit this configuration",
    )
    assert (run / "checkpoint.pt").read_bytes() == before
    status, text = train(*changed, "--accept-changes")
    assert status == 0, text
    assert text.count("from here on, ") == 2
    assert "from here on, lr: 6.0" in text
    assert "from here on, epochs: 2" in text
    assert logged_steps(run) == list(range(15))
    rates = [line["lr"] for line in read_metrics(run / "metrics.jsonl")]
    assert rates[4] == pytest.approx(rates[3] / 3 * 4 / 2), "of the same warm-up, to half the peak"
    status, text = train(*changed)
    assert status == 0, "from then on it is its configuration"


def test_resume_if_saved_begins_where_nothing_is_saved_and_goes_on_where_something_is(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = (
        tmp_path / "run",
        ["--data", unlabelled, *OPTIONS, "--run", tmp_path / "run", "--resume-if-saved"],
    )
    status, text = train("--data", unlabelled, *OPTIONS, "--run", tmp_path / "whole")
    assert status == 0, text
    run.mkdir()
    (run / "config.json").write_text("{}")  # it was killed before its first save
    at_step(monkeypatch, 3, ctrl_c)
    status, text = train(*options)
    assert status == 130
    assert f"the run that was in {run} is now in {run}.1" in text
    for damage in (None, lambda: (run / "checkpoint.pt").rename(run / "checkpoint-00000004.pt")):
        if damage:  # killed between the two renames of a save
            damage()
        at_step(monkeypatch, 7, ctrl_c)
        status, text = train(*options)
        assert f"resumed after step {8 if damage else 4}" in text
    assert status == 0, text
    assert same_weights(run, tmp_path / "whole")
    assert logged_steps(run) == list(range(10))
    assert_refused(
        train("--data", unlabelled, *OPTIONS, "--run", tmp_path / "new", "--resume"),
        "nothing to resume from",
    )


@pytest.mark.parametrize(
    ("options", "left"),
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
def test_the_last_checkpoints_and_the_milestones_are_left(
    train: Command, unlabelled: Path, tmp_path: Path, options: tuple[str, ...], left: list[int]
) -> None:
    status, text = train(
        "--data",
        unlabelled,
        *OPTIONS,
        "--checkpoint-minutes",
        "0",
        *options,
        "--run",
        tmp_path / "run",
    )
    assert status == 0, text
    numbered = [f"checkpoint-{step:08d}.pt" for step in left[:-1]]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == [
        *numbered,
        "checkpoint.pt",
    ]
    steps = [
        model.load_checkpoint(tmp_path / "run" / name)["step"]
        for name in (*numbered, "checkpoint.pt")
    ]
    assert steps == left


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", unlabelled, *OPTIONS, "--checkpoint-minutes", "0", "--run"]
    status, text = train(*options, tmp_path / "whole")
    assert status == 0, text
    at_step(monkeypatch, 6, ctrl_c)
    assert train(*options, tmp_path / "run")[0] == 130
    newest = tmp_path / "run" / "checkpoint.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 1
    newest.write_bytes(data)
    status, text = train(*options, tmp_path / "run", "--resume")
    assert status == 0, text
    assert f"{newest} is damaged" in text
    assert f"{tmp_path}/run/checkpoint-00000006.pt (step 6) is used instead" in text
    assert "resumed after step 6" in text
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert logged_steps(tmp_path / "run") == list(range(10))
    files = [{path.name for path in (tmp_path / run).glob("*.pt")} for run in ("run", "whole")]
    assert files[0] == files[1]
