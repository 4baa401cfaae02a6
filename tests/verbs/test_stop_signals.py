"""Ctrl-C, SIGTERM and SIGUSR1 stop a run of one process, which saves and can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from experiment import INTERRUPTED, PREEMPTED
from tests.helpers.runs import TINY, TRAIN, Command, at_step, ctrl_c, logged_steps
from tests.helpers.torchrun import errors

OPTIONS = [*TINY, "--epochs", "4", "--lr", "6", "--threads", "1", "--log-steps", "1"]  # 20 steps
STOP_STEP = 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_its_exit_status_tells_which_it_was(
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    options = ("--data", unlabelled, *OPTIONS, "--run-folder", run)
    at_step(monkeypatch, STOP_STEP, lambda: os.kill(os.getpid(), number))
    status, text = train(*options)
    assert status == (130 if number == signal.SIGINT else 75), text
    assert f"interrupted after step {STOP_STEP + 1}; use --resume to continue" in text
    assert (run / "preempted").exists() == (status == 75)

    at_step(monkeypatch, STOP_STEP + 3, ctrl_c)
    assert train(*options, "--resume-if-saved")[0] == 130
    assert not (run / "preempted").exists(), "it was about the run before"
    assert logged_steps(run) == list(range(STOP_STEP + 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "function", ["pipeline.open_store", "pipeline.view_grid", "model.export_backbone"]
)
def test_a_preemption_signal_outside_the_loop_ends_the_run_quietly(
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    function: str,
) -> None:
    run = tmp_path / "run"
    options = ("--data", unlabelled, *OPTIONS, "--epochs", "1", "--run-folder", run)
    with monkeypatch.context() as patch:
        patch.setattr(function, lambda *_: os.kill(os.getpid(), number))
        status, text = train(*options)
    assert status == 75, text
    assert not errors(text), text
    assert (run / "preempted").exists()

    status, text = train(*options, "--resume-if-saved")
    assert status == 0, text
    was_saved = function == "model.export_backbone"
    assert ("resumed after step 5" in text) == was_saved
    assert logged_steps(run) == list(range(5))
    assert not (run / "preempted").exists()


def test_ctrl_c_outside_the_loop_ends_the_run_quietly(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_store", lambda *_: ctrl_c())
    status, text = train("--data", unlabelled, *TINY, "--run-folder", tmp_path / "run")
    assert status == INTERRUPTED == 130
    assert not errors(text), text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("awaited_line", "saved"),
    [
        pytest.param("twinfeed", False, id="while it imports"),
        pytest.param("pretraining", True, id="while it trains", marks=pytest.mark.slow),
    ],
)
def test_sigterm_stops_a_process(
    unlabelled: Path, tmp_path: Path, awaited_line: str, saved: bool
) -> None:
    run = tmp_path / "run"
    options = [*OPTIONS, "--epochs", "4000", "--run-folder", str(run)]
    command = [sys.executable, str(TRAIN), "--data", str(unlabelled), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = ""
        while awaited_line not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        process.terminate()
        assert process.wait(timeout=60) == PREEMPTED
        assert process.stderr.read() == ""
    assert (run / "checkpoint.pt").exists() == saved
