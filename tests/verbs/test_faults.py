"""A fault in a step ends the run with one error, saves the last step, and leaves nothing behind."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import model
import pipeline
from pipeline import distort_cpu
from pipeline.decoders import cpu as cpu_decoder
from tests.helpers.faults import (
    FAULT_STEP,
    OPTIONS,
    OUT_OF_MEMORY,
    UNEXPECTED,
    assert_resume_is_exact,
    assert_saved,
    fail_at_call,
)
from tests.helpers.runs import Command, assert_refused, saved_step

pytestmark = pytest.mark.usefixtures("no_hang")


class Fault(NamedTuple):
    """A call of a function that fails, and the words of the error that the run ends with."""

    owner: Any
    function: str
    call: int
    error: BaseException
    words: tuple[str, ...]
    after: bool = False  # the call does its work before it fails
    ahead: int = 0  # batches that the threads of the loader prepare before their step


HOST_OUT_OF_MEMORY = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
)
CROP = (cpu_decoder, "crop_and_resize", 16 * FAULT_STEP)  # a call for each of 8 images, 2 views
DISTORT = (distort_cpu, "distort_view", 2 * FAULT_STEP)  # a call for each view
FORWARD = (model.BarlowTwins, "forward", FAULT_STEP)
UNEXPECTED_WORDS = ("RuntimeError: a mistake in the program", "TWINFEED_TRACEBACK=1")
MEMORY_WORDS = ("out of memory", "smaller --batch-size")

FAULTS = {
    "decoding": Fault(*CROP, UNEXPECTED, UNEXPECTED_WORDS, ahead=3),
    "decoding, out of memory": Fault(*CROP, MemoryError(), MEMORY_WORDS, ahead=3),
    "decoding, a library that exits": Fault(
        *CROP, SystemExit(0), ("a thread of the loader ended with SystemExit(0)",), ahead=3
    ),
    "distorting": Fault(*DISTORT, UNEXPECTED, UNEXPECTED_WORDS[:1], ahead=3),
    "copying to the device": Fault(
        pipeline.Loader, "_finish", FAULT_STEP, OUT_OF_MEMORY, MEMORY_WORDS
    ),
    "forward pass": Fault(*FORWARD, OUT_OF_MEMORY, ("2.00 GiB", *MEMORY_WORDS), after=True),
    "forward pass, on the host": Fault(
        *FORWARD, HOST_OUT_OF_MEMORY, ("4 bytes", *MEMORY_WORDS), after=True
    ),
    "backward pass": Fault(
        torch.Tensor, "backward", FAULT_STEP, OUT_OF_MEMORY, ("2.00 GiB", *MEMORY_WORDS)
    ),
    "learning rate": Fault(
        model,
        "learning_rate_factor",
        FAULT_STEP,
        KeyError("a bug"),
        ("KeyError: 'a bug'", "TWINFEED_TRACEBACK=1"),
    ),
}


def skip_view_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw views.png, which would call the functions that are to fail in a step."""
    monkeypatch.setattr(pipeline, "view_grid", lambda *_: None)


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_saves_the_last_step_and_resume_is_exact(
    train: Command,
    own_photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    fault = FAULTS[name]
    run = tmp_path / "run"
    threads = set(threading.enumerate())
    open_files = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        skip_view_grid(patch)
        fail_at_call(patch, fault.owner, fault.function, fault.call, fault.error, after=fault.after)
        result = train("--data", own_photos, *OPTIONS, "--run-folder", run)

    step = assert_saved(result, run, *fault.words)
    assert FAULT_STEP - 1 - fault.ahead <= step < FAULT_STEP
    assert set(threading.enumerate()) == threads
    assert os.listdir("/proc/self/fd") == open_files
    assert_resume_is_exact(train, own_photos, run, uninterrupted)


class QueueThatFails(queue.Queue[Any]):
    """Takes some items; from then on, putting even an error into it fails."""

    items = 0

    def put(self, *arguments: Any, **options: Any) -> None:
        if self.items == FAULT_STEP:
            raise MemoryError
        super().put(*arguments, **options)
        self.items += 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_thread_that_dies_silently_does_not_hang_the_run(
    train: Command,
    own_photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        skip_view_grid(patch)
        patch.setattr(queue, "Queue", QueueThatFails)
        result = train("--data", own_photos, *OPTIONS, "--run-folder", run)
    assert assert_saved(result, run, "the thread that makes the batches is gone") == FAULT_STEP
    assert_resume_is_exact(train, own_photos, run, uninterrupted)


def test_repeated_faults_lose_no_completed_steps(
    train: Command,
    own_photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    owner, function, _ = FORWARD
    for call, options, expected_step in ((4, [], 3), (1, ["--resume"], 3), (2, ["--resume"], 4)):
        with monkeypatch.context() as patch:
            fail_at_call(patch, owner, function, call, OUT_OF_MEMORY, after=True)
            result = train("--data", own_photos, *OPTIONS, "--run-folder", run, *options)
        assert assert_saved(result, run) == expected_step
    assert_resume_is_exact(train, own_photos, run, uninterrupted)


def test_the_traceback_of_a_mistake_is_shown_on_request(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    skip_view_grid(monkeypatch)
    fail_at_call(monkeypatch, *CROP, UNEXPECTED)
    monkeypatch.setenv("TWINFEED_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a mistake in the program") as caught:
        train("--data", own_photos, *OPTIONS, "--run-folder", run)
    files = [str(entry.path) for entry in caught.traceback]
    assert cpu_decoder.__file__ in files, "the traceback of the decoding thread"
    assert caught.value.__notes__[-1].endswith("continue with --resume")
    assert saved_step(run) > 0


def test_a_mistake_outside_the_loop_is_one_line_too(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_call(monkeypatch, model, "export_backbone", 1, UNEXPECTED)
    options = [*OPTIONS, "--epochs", "1", "--run-folder", tmp_path / "run"]
    assert_refused(train("--data", own_photos, *options), *UNEXPECTED_WORDS)
