"""The learning-rate schedule: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, *, start: float = 0.0, end: float = 0.001
) -> float:
    """The learning rate at a step, as a fraction of its peak.

    It rises linearly over the warm-up and then falls along a cosine. The last step, `steps - 1`, is
    just above `end`, which would be reached at `steps`.

    Args:
        step: The step, counted from 0.
        steps: The number of steps of the run.
        warmup_steps: The number of steps of the linear warm-up; the next one is at the peak.
        start: The fraction at step 0.
        end: The fraction at the end of the cosine.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(angle))
    return end + (1 - end) * cosine
