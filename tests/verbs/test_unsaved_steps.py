"""If the last step cannot or must not be saved, the previous checkpoint stays valid."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import model
from tests.helpers.faults import (
    FAULT_STEP,
    OPTIONS,
    OUT_OF_MEMORY,
    assert_resume_is_exact,
    fail_at_call,
    fresh_copy,
)
from tests.helpers.runs import (
    Command,
    assert_refused,
    at_step,
    ctrl_c,
    logged_steps,
    saved_step,
)

pytestmark = pytest.mark.usefixtures("no_hang")

DIVERGING = [
    *("--lr", "1e30"),
    *("--lr-biases", "1e30"),
    *("--warmup-epochs", "0"),
]


def fail_within_update(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make an update fail after it has changed some of the weights."""
    layer_rates = model.lars._layer_rates
    calls = 0

    def failing(params: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            params[0].data.add_(1)
            raise fresh_copy(OUT_OF_MEMORY)
        return layer_rates(params, *arguments)

    monkeypatch.setattr(model.lars, "_layer_rates", failing)


@pytest.mark.parametrize(("minutes", "last_saved"), [("0", 7), ("60", 3)])
def test_a_fault_within_an_update_leaves_the_previous_checkpoint(
    train: Command,
    own_photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: str,
    last_saved: int,
) -> None:
    run = tmp_path / "run"
    options = ("--data", own_photos, *OPTIONS, "--run-folder", run)
    with monkeypatch.context() as patch:
        at_step(patch, 2, ctrl_c)
        assert train(*options)[0] == 130
    with monkeypatch.context() as patch:
        fail_within_update(patch, 5)
        result = train(*options, "--checkpoint-minutes", minutes, "--resume")
    assert_refused(result, "after step 7; ", f"last checkpoint is step {last_saved} in", "--resume")
    lost = "step 7 could not be saved (the next update had begun)"
    assert (lost in result[1]) == (last_saved < 7)
    assert saved_step(run) == last_saved
    assert_resume_is_exact(train, own_photos, run, uninterrupted)


def test_a_fault_in_the_first_step_does_not_suggest_resuming(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_call(monkeypatch, model.BarlowTwins, "forward", 1, OUT_OF_MEMORY, after=True)
    result = train("--data", own_photos, *OPTIONS, "--run-folder", tmp_path / "run")
    assert_refused(
        result, "smaller --batch-size", "after step 0; there is no checkpoint to resume from"
    )
    assert "--resume" not in result[1]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_dry_run_that_is_out_of_memory_saves_nothing(
    train: Command, own_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_call(monkeypatch, model.BarlowTwins, "forward", 2, OUT_OF_MEMORY, after=True)
    result = train("--data", own_photos, *OPTIONS, "--dry-run")
    assert_refused(result, "smaller --batch-size")
    assert "saved" not in result[1]
    assert list(Path.cwd().iterdir()) == []


def test_a_state_that_cannot_be_read_from_the_device_is_not_saved(tmp_path: Path) -> None:
    """For example after an illegal memory access, when every CUDA call fails."""

    def state(step: int) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    def loop(checkpoints: model.Checkpoints) -> None:
        checkpoints.save({"step": 3})
        with model.StepSaver(torch.nn.BatchNorm1d(2), state, checkpoints, 3) as guard:
            with guard.update(lambda: torch.tensor(0.0)):
                pass
            raise KeyError

    with model.Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyError) as caught:
        loop(checkpoints)
    assert caught.value.__notes__ == [
        "training stopped after step 4; step 4 could not be saved "
        "(CUDA error: an illegal memory access was encountered); "
        f"the last checkpoint is step 3 in {tmp_path}/checkpoint.pt: continue with --resume"
    ]


def test_a_run_that_diverges_does_not_suggest_resuming(
    train: Command, own_photos: Path, tmp_path: Path
) -> None:
    options = [*OPTIONS, *DIVERGING, "--checkpoint-minutes", "0", "--run-folder", tmp_path / "run"]
    result = train("--data", own_photos, *options)
    assert_refused(result, "the loss is", "lower --lr")
    assert "--resume" not in result[1]


def test_weights_with_a_nan_loss_are_not_saved_after_a_fault(
    train: Command, own_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_at_call(monkeypatch, torch.Tensor, "backward", 5, OUT_OF_MEMORY)
    options = [*OPTIONS, *DIVERGING, "--log-steps", "100", "--run-folder", run]
    assert_refused(
        train("--data", own_photos, *options),
        "after step 4",
        "the loss is nan",
        "there is no checkpoint to resume from",
    )
    assert not (run / "checkpoint.pt").exists()


@contextmanager
def disk_that_fills_up(size: int) -> Iterator[Callable[[], None]]:
    """Yields a function; from its call on, no file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("log_steps", ["1", "100"], ids=["in the metrics", "in the checkpoint"])
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(
    train: Command,
    own_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_steps: str,
) -> None:
    run = tmp_path / "run"
    options = ["--data", own_photos, *OPTIONS, "--log-steps", log_steps]
    options += ["--checkpoint-minutes", "0", "--run-folder", run]
    with disk_that_fills_up(1000) as fill:
        at_step(monkeypatch, FAULT_STEP, fill)
        result = train(*options)
    kept = saved_step(run)
    # The save of the last step may not be finished when the disk is full.
    assert kept in (FAULT_STEP - 1, FAULT_STEP)
    assert_refused(
        result, "too large", "could not be saved", f"last checkpoint is step {kept} in", "--resume"
    )
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]

    status, text = train(*options, "--resume")
    assert status == 0, text
    assert logged_steps(run) == (list(range(20)) if log_steps == "1" else [0, 19])
