"""Ranks under torchrun that are stopped or that fail: all end, one prints why, and rank 0 saves."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.helpers.runs import TINY, saved_step
from tests.helpers.torchrun import Torchrun, errors, tracebacks

OPTIONS = [*TINY, "--epochs", "4", "--lr", "6", "--threads", "1", "--log-steps", "1"]  # 20 steps
FAULT_STEP = 7

# Rank 1 ends long before rank 0 has saved.
SLOW_DISK = """
import model
fsync = os.fsync
learning_rate_factor = model.learning_rate_factor

def slow_fsync(file):
    time.sleep(3)
    fsync(file)

def slow_step(*arguments, **options):
    time.sleep(0.2)
    return learning_rate_factor(*arguments, **options)

os.fsync = slow_fsync
model.learning_rate_factor = slow_step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "receiver", "number", "options", "preempted"),
    [
        (0, "os.getppid()", "SIGINT", (), False),
        (0, "os.getppid()", "SIGUSR1", ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"), True),
        (1, "os.getpid()", "SIGUSR1", (), True),
    ],
    ids=["Ctrl-C", "SIGUSR1 to torchrun", "SIGUSR1 to one rank"],
)
def test_a_signal_stops_all_ranks_and_rank_0_saves(
    torchrun: Torchrun,
    unlabelled: Path,
    tmp_path: Path,
    rank: int,
    receiver: str,
    number: str,
    options: tuple[str, ...],
    preempted: bool,
) -> None:
    run = tmp_path / "run"
    hook = f"""{SLOW_DISK}
if rank == "{rank}":
    at_step({FAULT_STEP}, lambda: os.kill({receiver}, signal.{number}))
"""
    arguments = ["--data", unlabelled, *OPTIONS, "--run-folder", run]
    status, text = torchrun(*arguments, hook=hook, options=options)
    assert status != 0
    assert not errors(text) + tracebacks(text), text
    step = saved_step(run)
    assert FAULT_STEP < step < 20
    assert text.count(f"interrupted after step {step}; use --resume to continue") == 1
    assert (run / "preempted").exists() == preempted
    if receiver == "os.getpid()":
        assert "exitcode  : 75" in text, "rank 0 was not stopped by torchrun"
        assert "closing signal" not in text


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        (1, "fail()"),
        pytest.param(0, "fail()", marks=pytest.mark.slow),
        pytest.param(1, "os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param(0, "os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_all_and_rank_0_prints_where_to_resume(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path, rank: int, fault: str
) -> None:
    """When its process is gone, torchrun sends SIGTERM to the other one.

    That must not come before the other one has saved and printed, although it takes its time here.
    """
    run = tmp_path / "run"
    failed_at = tmp_path / "failed"
    hook = f"""
import pipeline
steps = pipeline.Loader.steps

def steps_that_end_slowly(*arguments):
    try:
        yield from steps(*arguments)
    finally:
        time.sleep(1.5)

if rank == "{rank}":
    at_step({FAULT_STEP}, lambda: (open({str(failed_at)!r}, "w").close(), {fault}))
else:
    pipeline.Loader.steps = steps_that_end_slowly
"""
    status, text = torchrun("--data", unlabelled, *OPTIONS, "--run-folder", run, hook=hook)
    assert status != 0
    assert time.time() - failed_at.stat().st_mtime < 60
    raised = fault == "fail()"
    assert len(tracebacks(text)) == 1, text
    assert len(re.findall("^KeyError: 'a bug'$", text, re.MULTILINE)) == raised, text
    assert sum("KeyError: 'a bug'" in line for line in errors(text)) == raised, text
    if raised or rank == 1:
        note = (
            f"training stopped after step {FAULT_STEP}; the last checkpoint is step {FAULT_STEP} "
            f"in {run / 'checkpoint.pt'}: continue with --resume"
        )
        assert sum(note in line for line in errors(text)) == 1, text
        assert saved_step(run) == FAULT_STEP
    assert not (run / "preempted").exists()


@pytest.mark.slow
def test_a_rank_that_fails_before_the_first_step_is_not_a_preemption(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path
) -> None:
    """torchrun ends rank 0 with SIGTERM then, as a scheduler does that preempts a run.

    The file `preempted` would make the scheduler start the run again.
    """
    run = tmp_path / "run"
    hook = """
import pipeline

def find_device(*arguments):
    time.sleep(2)  # by then, rank 0 waits for this one
    fail()

if rank == "1":
    pipeline.find_device = find_device
"""
    status, text = torchrun("--data", unlabelled, *OPTIONS, "--run-folder", run, hook=hook)
    assert status != 0
    assert sum("KeyError: 'a bug'" in line for line in errors(text)) == 1, text
    assert "forcefully" not in text, "SIGTERM must end the other rank"
    assert not (run / "preempted").exists()
