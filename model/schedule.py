"""The learning rate of a step: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, *, start: float = 0.0, end: float = 0.001
) -> float:
    """The fraction of the peak learning rate at `step` (from 0) of `steps`.

    Rises linearly from `start` over `warmup_steps`, then falls along a cosine towards `end`, which it would reach at
    `steps`.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    return end + (1 - end) * cosine
