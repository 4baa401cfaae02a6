"""The learning-rate schedule, compared with the authors' code and with values by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from model import learning_rate_factor


def authors_rate(step: int, max_steps: int, warmup_steps: int) -> float:
    """`adjust_learning_rate` of the authors' main.py, for a base rate of 1."""
    if step < warmup_steps:
        return step / warmup_steps
    step, max_steps = step - warmup_steps, max_steps - warmup_steps
    q = 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return 1.0 * q + 0.001 * (1 - q)


def test_the_schedule_is_the_authors() -> None:
    ours = [learning_rate_factor(step, 300, 30) for step in range(300)]
    assert ours == pytest.approx([authors_rate(step, 300, 30) for step in range(300)], rel=1e-12)


def test_the_schedule_warms_up_to_its_peak_and_falls_to_its_end() -> None:
    rates = [learning_rate_factor(step, 110, 10, start=0.2, end=0.1) for step in range(111)]
    by_hand = {0: 0.2, 5: 0.6, 10: 1.0, 35: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 60: 0.55, 110: 0.1}
    assert {step: rates[step] for step in by_hand} == pytest.approx(by_hand)
    assert all(before < after for before, after in itertools.pairwise(rates[:11]))
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))


def test_without_warm_up_it_starts_at_its_peak() -> None:
    assert learning_rate_factor(0, 5, 0, start=0.5) == 1


def test_a_run_shorter_than_the_warm_up_stays_in_it() -> None:
    assert [learning_rate_factor(step, 2, 4) for step in range(2)] == [0, 0.25]
