"""When a run saves a checkpoint."""

from __future__ import annotations

import time


class CheckpointSchedule:
    """Saves every so many minutes, and at the end of every so many epochs.

    Args:
        minutes: Between two checkpoints.
        milestone_epochs: Epochs between two checkpoints that are kept for good; None for no such
            checkpoints.
        steps_per_epoch: Steps per epoch.
    """

    def __init__(self, minutes: float, milestone_epochs: int | None, steps_per_epoch: int) -> None:
        self._seconds = 60 * minutes
        self.milestone_steps = None
        if milestone_epochs is not None:
            self.milestone_steps = milestone_epochs * steps_per_epoch

    def is_due(self, step: int, saved_at: float) -> bool:
        """Whether to save after `step` (from 0), if the last checkpoint was saved at the
        `time.monotonic()` `saved_at`.
        """
        if time.monotonic() - saved_at > self._seconds:
            return True
        return self.milestone_steps is not None and (step + 1) % self.milestone_steps == 0
