"""When a run saves a checkpoint."""

from __future__ import annotations

import pytest

from experiment.checkpoint_schedule import CheckpointSchedule


def test_a_checkpoint_is_due_after_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = CheckpointSchedule(minutes=10, milestone_epochs=None, steps_per_epoch=5)
    monkeypatch.setattr("time.monotonic", lambda: 1600.0)
    assert not schedule.is_due(step=4, saved_at=1000.0)
    assert schedule.is_due(step=4, saved_at=999.0)


def test_a_milestone_is_due_after_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = CheckpointSchedule(minutes=10, milestone_epochs=2, steps_per_epoch=5)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    assert [step for step in range(30) if schedule.is_due(step, saved_at=1000.0)] == [9, 19, 29]
