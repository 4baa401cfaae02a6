"""StepSaver: a skipped step changes no averages, and a failed loop saves its last good step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import Checkpoints, StepSaver
from tests.helpers.checkpoints import equal_to_the_bit, raise_disk_full, state_at


def make_network() -> nn.Module:
    """Buffers of several types and shapes, each element with another value."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).double())
    network.register_buffer("table", torch.empty(2, 2))
    network.register_buffer("seen", torch.tensor([True, False]))
    change_buffers(network)
    return network


def change_buffers(network: nn.Module) -> None:
    """As a forward pass does."""
    for buffer in network.buffers():
        buffer.copy_(torch.randn(buffer.shape) * 100)


def spoil_buffers(network: nn.Module) -> None:
    """As a forward pass on overflowing activations does."""
    for buffer in network.buffers():
        buffer.copy_(torch.full_like(buffer, torch.nan) if buffer.is_floating_point() else ~buffer)


def copy_buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def not_skipped() -> Tensor:
    return torch.tensor(0.0)


def test_a_skipped_step_restores_the_averages() -> None:
    network, skipped = make_network(), torch.tensor(0.0)
    with StepSaver(network, state_at, None, 0) as saver:
        for is_skipped in (1.0, 0.0, 1.0, 1.0, 0.0):
            before = copy_buffers(network)
            change_buffers(network)
            if is_skipped:
                spoil_buffers(network)
            after_forward = copy_buffers(network)
            assert not equal_to_the_bit(before, after_forward)
            with saver.update(lambda: skipped):
                skipped.fill_(is_skipped)  # the optimizer decides during the update
            expected = before if is_skipped else after_forward
            assert equal_to_the_bit(copy_buffers(network), expected)


def test_a_failed_loop_saves_the_averages_of_the_last_step_that_was_not_skipped(
    tmp_path: Path,
) -> None:
    network = make_network()
    verdicts = iter([torch.tensor(0.0), torch.tensor(1.0)])

    def loop(checkpoints: Checkpoints) -> None:
        with StepSaver(
            network, lambda step: {"step": step, "model": network.state_dict()}, checkpoints, 0
        ) as saver:
            with saver.update(lambda: next(verdicts)):
                pass
            spoil_buffers(network)
            with saver.update(lambda: next(verdicts)):
                pass
            spoil_buffers(network)  # the forward pass of a third step
            raise KeyError

    before = copy_buffers(network)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyError) as caught:
        loop(checkpoints)
    assert caught.value.__notes__ == [
        "training stopped after step 2; "
        f"the last checkpoint is step 2 in {tmp_path}/checkpoint.pt: continue with --resume"
    ]
    state, _ = Checkpoints(tmp_path).load()
    assert state["step"] == 2
    assert equal_to_the_bit({name: state["model"][name] for name in before}, before)


def loop_that_fails_after_a_save(checkpoints: Checkpoints, error: Exception) -> None:
    with StepSaver(make_network(), state_at, checkpoints, 0) as saver:
        with saver.update(not_skipped):
            pass
        saver.save()
        raise error


def test_a_step_that_does_not_reach_the_disk_is_not_reported_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as checkpoints:
        loop_that_fails_after_a_save(checkpoints, KeyError())
    (note,) = caught.value.__notes__
    assert note.startswith("training stopped after step 1; step 1 could not be saved (")
    assert "No space left" in note
    assert note.endswith("); there is no checkpoint to resume from")


def test_a_diverged_run_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(FloatingPointError) as caught, Checkpoints(tmp_path) as checkpoints:
        loop_that_fails_after_a_save(checkpoints, FloatingPointError())
    assert not hasattr(caught.value, "__notes__")
