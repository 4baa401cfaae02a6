"""The verdict of `python -m bench step` in sentences: the limit, and what each change gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .loss_benchmark import AUTHORS_LOSS, OUR_LOSS
from .record import StepResult
from .step_candidates import AUTHORS
from .tables import number

MULTIPLY = "multiplications"
MEMORY = "memory traffic"
FUSED = "memory traffic without ReLUs"


def verdict(
    steps: Sequence[StepResult],
    bounds: Mapping[str, float],
    known: Mapping[str, float],
    loss_width: int,
) -> list[str]:
    """What limits the step, what the gain over the authors' step consists of, and the loss.

    Args:
        steps: What was measured, the forms of the loss included.
        bounds: Rooflines in images/s, by name and precision.
        known: The precomputed bounds for this GPU, by description.
        loss_width: The embedding width D of the loss that was measured.
    """
    return [
        *_describe_limit(steps, bounds, known),
        *_describe_gains(steps),
        *_describe_loss(steps, loss_width),
    ]


def _describe_limit(
    steps: Sequence[StepResult], bounds: Mapping[str, float], known: Mapping[str, float]
) -> list[str]:
    ours = [step for step in steps if step.against == AUTHORS and step.name != AUTHORS]
    if not ours:
        return []
    best = max(ours, key=lambda step: step.rates.median)
    rate = best.rates.median
    multiply = bounds[f"{MULTIPLY}, {best.precision}"]
    memory = bounds[f"{MEMORY}, {best.precision}"]
    fused = bounds[f"{FUSED}, {best.precision}"]
    limit = "Memory traffic" if memory < multiply else "Multiplication"
    sentences = [
        f"{limit} is the limit in {best.precision}. "
        f"Bound by memory traffic (no fusion): {number(memory)} images/s; "
        f"with ReLU fused: {number(fused)}; by matrix products: {number(multiply)}. "
        f"Reached by the fastest step ({best.name.removeprefix('+ ')}, batch {best.batch_size}): "
        f"{number(rate)}, which is {rate / memory:.0%}, {rate / fused:.0%} and "
        f"{rate / multiply:.0%} of these."
    ]
    if known:
        fractions = [
            f"{rate / bound:.0%} of {bound:,.0f} ({description})"
            for description, bound in known.items()
        ]
        sentences.append(
            f"As fractions of the precomputed bounds for this GPU: {', '.join(fractions)}."
        )
    return sentences


def _describe_gains(steps: Sequence[StepResult]) -> list[str]:
    """For each batch size, the factor that each change contributes to the rate."""
    ratios: dict[int, dict[str, float]] = {}
    for step in steps:
        if step.against == AUTHORS and step.ratio is not None:
            ratios.setdefault(step.batch_size, {})[step.name] = step.ratio
    sentences = []
    for batch_size, by_name in ratios.items():
        changes = [name for name in by_name if name == AUTHORS or name.startswith("+")]
        factors = [
            f"{by_name[name] / by_name[before]:.2f} ({name.removeprefix('+ ')})"
            for before, name in pairwise(changes)
        ]
        if not factors:
            continue
        others = [f"; {name} {ratio:.2f}" for name, ratio in by_name.items() if name not in changes]
        sentences.append(
            f"At batch {batch_size}, speed-up over the authors' step, by change: "
            f"{' x '.join(factors)} = {by_name[changes[-1]]:.2f}{''.join(others)}."
        )
    return sentences


def _describe_loss(steps: Sequence[StepResult], loss_width: int) -> list[str]:
    forms = {step.name: step for step in steps if step.against == AUTHORS_LOSS}
    if len(forms) != 2:
        return []
    theirs = forms[AUTHORS_LOSS]
    ours = forms[OUR_LOSS]
    less_memory = (theirs.memory_gib or 0) / (ours.memory_gib or 1)
    return [
        f"For N {ours.batch_size} and D {loss_width} our loss takes 1/{ours.ratio:.0f} of the time "
        f"of the authors' form and 1/{less_memory:.0f} of its memory."
    ]
