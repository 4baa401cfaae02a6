"""The last step of a loop: what a skipped one and a fault leave of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from model import Checkpoints, StepGuard
from tests.model.test_checkpoint import same
from tests.model.test_checkpoints import at


def norms(seed: int = 0) -> torch.nn.Module:
    """Averages of several types and shapes, with another value in each place."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).double())
    network.register_buffer("table", torch.empty(2, 2))
    network.register_buffer("seen", torch.tensor([True, False]))
    for buffer in network.buffers():
        buffer.copy_(torch.randn(buffer.shape) * 100)
    return network


def averages(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def nothing() -> torch.Tensor:
    return torch.tensor(0.0)


def spoil(network: torch.nn.Module) -> None:
    """What a forward pass on views that overflow leaves."""
    for buffer in network.buffers():
        buffer.copy_(torch.full_like(buffer, torch.nan) if buffer.is_floating_point() else ~buffer)


def test_a_skipped_step_leaves_the_averages_as_they_were() -> None:
    network, verdict = norms(), torch.tensor(0.0)
    with StepGuard(network, at, None, 0) as last:
        for skipped in (1.0, 0.0, 1.0, 1.0, 0.0):
            before = averages(network)
            for buffer in network.buffers():
                buffer.copy_(torch.randn(buffer.shape) * 100)
            if skipped:
                spoil(network)
            made = averages(network)
            assert not same(before, made)
            with last.update(lambda: verdict):
                verdict.fill_(skipped)  # which the optimizer only knows afterwards
            assert same(averages(network), before if skipped else made)


def test_a_rescue_saves_the_averages_of_the_last_step_that_was_not_skipped(tmp_path: Path) -> None:
    network = norms()
    verdicts = iter([torch.tensor(0.0), torch.tensor(1.0)])

    def loop(checkpoints: Checkpoints) -> None:
        with StepGuard(
            network, lambda step: {"step": step, "model": network.state_dict()}, checkpoints, 0
        ) as last:
            with last.update(lambda: next(verdicts)):
                pass
            spoil(network)
            with last.update(lambda: next(verdicts)):
                pass
            spoil(network)  # a third step's forward pass
            raise KeyError

    before = averages(network)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyError) as caught:
        loop(checkpoints)
    assert caught.value.__notes__ == [
        f"it ended after step 2, which is saved in {tmp_path}/checkpoint.pt: continue with --resume"
    ]
    state, _ = Checkpoints(tmp_path).load()
    assert state["step"] == 2
    assert same({name: state["model"][name] for name in before}, before)


def test_a_step_that_does_not_reach_the_disk_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )

    def loop(checkpoints: Checkpoints, error: Exception) -> None:
        with StepGuard(norms(), at, checkpoints, 0) as last:
            with last.update(nothing):
                pass
            last.save()
            raise error

    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as checkpoints:
        loop(checkpoints, KeyError())
    (note,) = caught.value.__notes__
    assert note.startswith("it ended after step 1, which cannot be saved (")
    assert "No space left" in note
    assert note.endswith("): there is no checkpoint to resume from")
    with pytest.raises(FloatingPointError) as diverged, Checkpoints(tmp_path) as checkpoints:
        loop(checkpoints, FloatingPointError())
    assert not hasattr(diverged.value, "__notes__")
