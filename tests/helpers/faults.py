"""Faults that tests cause in a run of train.py, and how such a run must end."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import (
    TINY,
    Command,
    assert_refused,
    logged_steps,
    same_weights,
    saved_step,
)

# 20 steps of 40 images. With the usual interval of checkpoints, only the last step is saved.
OPTIONS = [
    *TINY,
    *("--epochs", "4"),
    *("--log-steps", "3"),
    *("--lr", "6"),
    *("--threads", "2"),
]
FAULT_STEP = 7  # completed steps at most faults

OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines about it"
)
UNEXPECTED = RuntimeError("a mistake in the program")


def fail_at_call(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: BaseException,
    *,
    after: bool = False,
) -> None:
    """Make a call of a function raise an error.

    Args:
        monkeypatch: Undoes it.
        owner: The module or class of the function.
        name: The name of the function.
        call: Which call fails, counted from 1.
        error: A copy of it is raised.
        after: Whether the call does its work before it fails.
    """
    function = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        fails = calls == call
        if fails and not after:
            raise fresh_copy(error)
        result = function(*arguments, **options)
        if fails:
            raise fresh_copy(error)
        return result

    monkeypatch.setattr(owner, name, failing)


def fresh_copy(error: BaseException) -> BaseException:
    """A copy of the error without notes; `copy.copy` shares the list of notes."""
    copied = copy.copy(error)
    vars(copied).pop("__notes__", None)
    return copied


def assert_saved(result: tuple[int, str], run: Path, *words: str) -> int:
    """Check that a run has failed with one error, and has saved the last completed step.

    The error must contain `words`, the step, and where to resume. Returns the step.
    """
    assert_refused(result, *words, "--resume", str(run / "checkpoint.pt"))
    (step,) = re.findall(r"stopped after step (\d+); the last checkpoint is step \1 in", result[1])
    assert saved_step(run) == int(step)
    return int(step)


def assert_resume_is_exact(train: Command, photos: Path, run: Path, uninterrupted: Path) -> None:
    """Resume a run, and check that it ends like one that was not interrupted, to the bit."""
    status, text = train("--data", photos, *OPTIONS, "--run-folder", run, "--resume")
    assert status == 0, text
    assert same_weights(run, uninterrupted)
    assert logged_steps(run) == logged_steps(uninterrupted)
