"""Findings about a run: does it learn, do its features collapse, does it wait for data?

`assess_health` runs all checks on a `RunRecord`. Each check looks at one metric, and its text names
the numbers and a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from statistics import median
from typing import NamedTuple

from .number_format import format_number
from .run_record import RECENT, RunRecord, finite_number

STARVED = 0.1  # fraction of the time spent waiting for data above which it is a problem

_LOWER_RATE = "a lower --lr or a longer --warmup-epochs"
_WARNINGS_SHOWN = 10


class Severity(StrEnum):
    """How bad a finding is, from the worst to the mildest."""

    BAD = "bad"
    WARN = "warn"
    GOOD = "good"
    NOTE = "note"


class Finding(NamedTuple):
    """One observation about a run, with a remedy if something is wrong."""

    severity: Severity
    title: str
    text: str


def assess_health(run: RunRecord) -> list[Finding]:
    """All findings about a run, the worst first. There is at least one."""
    findings = [
        _check_loss(run),
        _check_skipped_steps(run),
        _check_correlation(run),
        _check_features(run),
        _check_accuracy(run),
        _check_final_accuracy(run),
        _check_data_wait(run),
        _check_bad_images(run),
        *_logged_warnings(run),
    ]
    severities = list(Severity)
    return sorted(
        (finding for finding in findings if finding is not None),
        key=lambda finding: severities.index(finding.severity),
    )


def _check_loss(run: RunRecord) -> Finding:
    if run.rows and run.rows[-1].get("loss", 0) is None:
        since = next(step for step, value in run.points("loss") if value is None)
        return Finding(
            Severity.BAD,
            "Diverged",
            f"The loss has not been finite since step {since:,}. Start again with {_LOWER_RATE}.",
        )

    losses = run.values("loss")
    if len(losses) < 5 or losses[0] <= 0:
        return Finding(
            Severity.NOTE, "Too early to judge", f"Only {len(losses)} loss values logged so far."
        )

    first, lowest = losses[0], min(losses)
    recent = median(losses[-RECENT:])
    change = f"From {format_number(first)} to {format_number(recent)} ({recent / first - 1:+.0%})"
    if recent > 0.9 * first:
        return Finding(
            Severity.WARN,
            "The loss has not fallen",
            f"{change}. Try {_LOWER_RATE}, and check that both views of an image still show the "
            "same object.",
        )
    if recent > 1.5 * lowest:
        return Finding(
            Severity.WARN,
            "The loss is rising",
            f"{change}; the lowest was {format_number(lowest)}. "
            f"If it keeps rising, try {_LOWER_RATE}.",
        )
    return Finding(Severity.GOOD, "The loss has fallen", f"{change}.")


def _check_skipped_steps(run: RunRecord) -> Finding | None:
    counts = run.values("skipped")  # of all steps so far
    skipped = int(max(counts, default=0))
    if not skipped:
        return None
    recently = skipped - int(counts[-RECENT:][0])
    text = (
        f"{skipped:,} of {run.steps_done:,} steps were skipped because their gradients were not "
        f"finite, {recently:,} of them recently. A few early ones are normal in float16"
    )
    if skipped <= 0.01 * run.steps_done:
        return Finding(Severity.NOTE, "Steps were skipped", f"{text}.")
    severity = Severity.BAD if skipped > 0.1 * run.steps_done else Severity.WARN
    return Finding(severity, "Steps were skipped", f"{text}; for this many, try {_LOWER_RATE}.")


def _check_correlation(run: RunRecord) -> Finding | None:
    diagonal = run.recent("diagonal_mean")
    off_diagonal = run.recent("off_diagonal_rms")
    if diagonal is None or off_diagonal is None:
        return None

    batch_size = run.setting("batch_size")
    chance = ""
    if batch_size:
        chance = (
            f"; {batch_size**-0.5:.2g} is expected for independent dimensions in a batch of "
            f"{batch_size:.0f}"
        )
    text = (
        f"The mean of the diagonal of C is {diagonal:.2f} (goal 1), the RMS of the other elements "
        f"{off_diagonal:.2g} (goal 0{chance})."
    )
    if diagonal < 0.3:
        title = "The views do not agree yet"
        if run.steps_done <= (run.total_steps or math.inf) / 2:
            return Finding(Severity.NOTE, title, text)
        return Finding(Severity.WARN, title, f"{text} A longer run or milder distortions may help.")
    if off_diagonal > 0.4:
        return Finding(
            Severity.WARN,
            "The dimensions are redundant",
            f"{text} A higher --lambd decorrelates them.",
        )
    return Finding(Severity.GOOD, "The views agree", text)


def _check_features(run: RunRecord) -> Finding | None:
    """Do the features differ between images?"""
    severities = []
    numbers = []
    ranks = run.values("effective_rank")
    if ranks:
        # An effective rank of 1 means that all features lie in one direction.
        severities.append(_compare_with_past(ranks, collapsed=2.0))
        numbers.append(f"effective rank {_recent_and_maximum(ranks)}")
    deviations = run.values("feature_deviation")
    if deviations:
        severities.append(_compare_with_past(deviations, collapsed=0.05 * max(deviations)))
        numbers.append(f"standard deviation {_recent_and_maximum(deviations)}")

    text = "; ".join(numbers)
    if Severity.BAD in severities:
        return Finding(
            Severity.BAD,
            "Collapsed",
            f"All images have nearly the same features ({text}), and runs do not recover from "
            f"that. Start again with {_LOWER_RATE}.",
        )
    if Severity.WARN in severities:
        return Finding(
            Severity.WARN,
            "The features are getting less diverse",
            f"They may be about to collapse ({text}): a lower --lr may prevent that.",
        )
    if severities:
        return Finding(
            Severity.GOOD, "The features differ between images", f"Recent values: {text}."
        )
    return None


def _compare_with_past(values: list[float], collapsed: float) -> Severity:
    """Compare the recent values with the second half of the run.

    The first half is ignored: the rank may fall at the start of a healthy run.
    """
    recent = median(values[-RECENT:])
    if recent < collapsed:
        return Severity.BAD
    if recent < 0.5 * max(values[len(values) // 2 :]):
        return Severity.WARN
    return Severity.GOOD


def _recent_and_maximum(values: list[float]) -> str:
    return f"{median(values[-RECENT:]):.3g}, maximum {max(values):.3g}"


def _check_accuracy(run: RunRecord) -> Finding | None:
    scores = run.values("knn_top1")
    if len(scores) < 2:
        return None
    first, best, last = scores[0], max(scores), scores[-1]
    text = f"Top-1: first {first:.1f} %, best {best:.1f} %, last {last:.1f} %."
    if first < last and last > 0.9 * best:
        return Finding(Severity.GOOD, "kNN accuracy is rising", text)
    return Finding(Severity.WARN, "kNN accuracy is not rising", text)


def _check_final_accuracy(run: RunRecord) -> Finding | None:
    """Are the learned features better than those of an untrained network and of plain pixels?"""
    trained = finite_number(run.summary.get("knn_top1_trained"))
    baselines = {}
    for name in ("untrained", "pixels", "colour"):
        score = finite_number(run.summary.get(f"knn_top1_{name}"))
        if score is not None:
            baselines[name] = score
    if trained is None or not baselines:
        return None

    scores = {"trained": trained, **baselines}
    listed = ", ".join(f"{name} {score:.1f} %" for name, score in scores.items())
    text = f"kNN top-1 at the end: {listed}"
    if trained > max(baselines.values()):
        return Finding(Severity.GOOD, "The features beat the baselines", f"{text}.")
    return Finding(
        Severity.WARN,
        "The features do not beat the baselines",
        f"{text}. Look at the views below.",
    )


def _check_data_wait(run: RunRecord) -> Finding | None:
    waits = run.values("data_wait_fraction")[1:]  # the first one includes the start of the loader
    if not waits:
        return None
    recent = median(waits[-RECENT:])
    text = f"{recent:.1%} of the time is spent waiting for data."
    if recent > STARVED:
        return Finding(
            Severity.WARN,
            "Starved for data",
            f"{text} `python -m bench` finds the bottleneck and suggests remedies.",
        )
    return Finding(Severity.GOOD, "Data loading keeps up", text)


def _check_bad_images(run: RunRecord) -> Finding | None:
    bad = int(max(run.values("bad_images"), default=0))
    if not bad:
        return None
    images = run.setting("images")
    share = f"{bad:,} of {images:,.0f}" if images else f"{bad:,}"
    severity = Severity.WARN if bad > 0.01 * (images or 0) else Severity.NOTE
    return Finding(
        severity,
        "Images cannot be decoded",
        f"{share} images were replaced by others. Their names are in the output of train.py.",
    )


def _logged_warnings(run: RunRecord) -> Iterator[Finding]:
    """The last ten different warnings in metrics.jsonl."""
    steps_of: dict[str, list[int]] = {}
    for row in run.rows:
        warning = row.get("warning")
        if isinstance(warning, str):
            steps_of.setdefault(warning, []).append(row["step"])

    for warning, steps in list(steps_of.items())[-_WARNINGS_SHOWN:]:
        if len(steps) == 1:
            title = f"Warning at step {steps[0]:,}"
        else:
            title = f"{len(steps)} warnings, from step {steps[0]:,} to {steps[-1]:,}"
        yield Finding(Severity.WARN, title, warning)
