"""The verdict of `python -m bench` in sentences: the bottleneck, and the change that helps most.

The figures come from `resource_bounds.py`.
"""

from __future__ import annotations

from .resource_bounds import (
    CORES,
    Change,
    StageRates,
    bottleneck,
    bounds,
    changes,
    lowest_bound,
    seconds_per_image,
    without_step,
)
from .stage_names import DISTORT, E2E, PLAN, STEP, TWO_CROPS, WARM

_WORTH_NAMING = 1.05  # smallest gain of a change that is proposed
_SMALLEST_SHARE = 0.005  # of the time, that is named
_RESOURCES = {CORES: "The CPU cores"}
_ACTIVITIES = {
    PLAN: "planning",
    WARM: "reading",
    TWO_CROPS: "decoding and cropping",
    DISTORT: "distorting",
    STEP: "the training step",
}


def verdict(measured: StageRates) -> list[str]:
    """What limits training, how close training comes to that limit, and what would help."""
    sentences = [
        f"{_capitalized(_describe_bottleneck(measured))} "
        f"That allows {lowest_bound(measured):,.0f} images/s."
    ]
    sentences += _end_to_end(measured)
    sentences += _other_bounds(measured)
    sentences += _advice(measured, "training")
    if _step_dominates_cores(measured):
        feed = without_step(measured)
        sentences.append(
            f"The feed alone allows {lowest_bound(feed):,.0f} images/s, "
            f"{_describe_bottleneck(feed)}"
        )
        sentences += _advice(feed, "the feed")
    return sentences


def _describe_bottleneck(measured: StageRates) -> str:
    """The resource that limits, and the shares of its time."""
    resource = bottleneck(measured)
    seconds = seconds_per_image(measured)[resource]
    shares = {stage: spent / sum(seconds.values()) for stage, spent in seconds.items()}
    first, *others = shares
    if not others:
        return f"limited by {resource}."

    place = _count_cores(measured.cores) if resource == CORES else resource
    named = [
        f"{_ACTIVITIES[stage]} {shares[stage]:.0%}"
        for stage in others
        if shares[stage] >= _SMALLEST_SHARE
    ]
    rest = f" ({', '.join(named)})" if named else ""
    return f"limited by {_ACTIVITIES[first]}: {shares[first]:.0%} of the time on {place}{rest}."


def _end_to_end(measured: StageRates) -> list[str]:
    if E2E not in measured.rates:
        return []
    trained = measured.rates[E2E]
    reached = trained / lowest_bound(measured)
    sentences = [f"End to end, training reaches {trained:,.0f} images/s: {reached:.0%} of that."]
    if measured.on_gpu:
        busy = trained / measured.rates[STEP]
        sentences.append(f"The GPU trains {busy:.0%} of the time.")
    return sentences


def _other_bounds(measured: StageRates) -> list[str]:
    lowest = lowest_bound(measured)
    return [
        f"{_RESOURCES.get(resource, _capitalized(resource))} could deliver "
        f"{bound / lowest:.1f} times as many images/s."
        for resource, bound in bounds(measured).items()
        if resource != bottleneck(measured)
    ]


def _advice(measured: StageRates, purpose: str) -> list[str]:
    """The change that helps most; if it needs hardware, also the best that does not."""
    helpful = [change for change in changes(measured) if change.gain >= _WORTH_NAMING]
    if not helpful:
        return ["Neither more cores nor other data would help."]
    best = helpful[0]
    sentences = [f"To speed up {purpose}: {_expectation(best)}."]
    without_hardware = [change for change in helpful if not change.needs_hardware]
    if best.needs_hardware and without_hardware:
        sentences.append(f"On this machine: {_expectation(without_hardware[0])}.")
    return sentences


def _expectation(change: Change) -> str:
    up_to = "up to " if change.is_upper_bound else ""
    return f"{change.description} (expected: {up_to}{change.gain:.1f} times as many images/s)"


def _step_dominates_cores(measured: StageRates) -> bool:
    if bottleneck(measured) != CORES:
        return False
    longest = next(iter(seconds_per_image(measured)[CORES]))
    return longest == STEP


def _count_cores(cores: int) -> str:
    return "1 core" if cores == 1 else f"{cores} cores"


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
