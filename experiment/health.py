"""What a run's folder holds, and what that says about the run's health, in words."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .metrics import read_metrics

Points = Sequence[tuple[int, float | None]]  # (step, value); None breaks a line
Finding = tuple[str, str, str]  # tone, title, sentence

TONES = ("bad", "warn", "good", "note")  # the worst first
STARVED = 0.1  # fraction of the time spent waiting for data from which on something should be done


def read_run(folder: Path) -> Run:
    """ValueError where `folder` is none of a run. What is missing, or not written to its end, is left out."""
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise ValueError(
            f"{folder} is no folder of a run: it holds neither config.json nor metrics.jsonl"
        )
    config, environment, summary = (
        _read(folder / f"{name}.json") for name in ("config", "environment", "summary")
    )
    rows = sorted(read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"])
    return Run(folder, config, environment, summary, rows)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        if isinstance(values := json.loads(path.read_bytes()), dict):
            return values
    return {}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl, by their steps

    @property
    def step(self) -> int:
        """Steps done, as far as they are known of."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @property
    def steps(self) -> int | None:
        images, batch, epochs = (self.setting(name) for name in ("images", "batch_size", "epochs"))
        return int(images // batch * epochs) if images and batch and epochs else None

    def setting(self, name: str) -> float | None:
        return _number(self.config.get(name))

    def points(self, name: str, factor: float = 1.0) -> Points:
        """Of the lines that have this value, and None at those from after the run has diverged."""
        found: list[tuple[int, float | None]] = []
        for row in self.rows:
            if (value := _number(row.get(name))) is not None:
                found.append((row["step"], factor * value))
            elif "loss" in row and _number(row["loss"]) is None:
                found.append((row["step"], None))
        return found

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name) if value is not None]

    def lately(self, name: str) -> float | None:
        """The median of its last ten values: single batches scatter."""
        return median(values[-10:]) if (values := self.values(name)) else None

    def status(self) -> tuple[str, str]:
        """A word, and how far it is."""
        reached = f"at step {self.step:,}" + (f" of {self.steps:,}" if self.steps else "")
        if self.summary:
            return (
                "finished",
                f"after {int(_number(self.summary.get('steps')) or self.step):,} steps",
            )
        if (self.folder / "preempted").exists():
            return (
                "preempted",
                f"{reached}: stopped by a signal and saved; --resume goes on from there",
            )
        with suppress(FileNotFoundError), open(self.folder / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                rate, batch = self.lately("images_per_s"), self.setting("batch_size")
                if not (self.steps and batch and rate):
                    return "running", reached
                minutes = round((self.steps - self.step) * batch / rate / 60)
                return "running", f"{reached}, {minutes // 60} h {minutes % 60:02} min left"
        return "stopped", f"{reached}; --resume goes on from its last checkpoint"


def _number(value: object) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def figure(value: float, unit: str = "") -> str:
    """A number of four digits; unit "%" for fractions."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e5 else f"{value / 1000:,.4g}k"
    return f"{value:.4g}".replace("e-0", "e-")


def verdict(run: Run) -> list[Finding]:
    """What the numbers say about this run's health and what helps, the worst first."""
    found = [*_learning(run), *_features(run), *_accuracy(run), *_feeding(run)]
    return sorted(found, key=lambda finding: TONES.index(finding[0]))


def _learning(run: Run) -> Iterator[Finding]:
    losses, now = run.values("loss"), run.lately("loss")
    lower = "a lower --lr or a longer --warmup-epochs"
    if run.rows and run.rows[-1].get("loss", 0) is None:
        since = next(step for step, value in run.points("loss") if value is None)
        yield (
            "bad",
            "Diverged",
            f"The loss is no finite number since step {since:,}. Begin again with {lower}.",
        )
    elif now is None or len(losses) < 5 or losses[0] <= 0:
        yield "note", "Too early to judge", f"Values of the loss so far: {len(losses)}."
    else:
        change = f"From {figure(losses[0])} to {figure(now)} ({now / losses[0] - 1:+.0%})"
        if now > 0.9 * losses[0]:
            yield (
                "warn",
                "The loss has not fallen",
                f"{change}. Try {lower}; do the views below still show one thing?",
            )
        elif now > 1.5 * min(losses):
            yield (
                "warn",
                "The loss rises",
                f"{change}, after {figure(min(losses))}. Where it goes on, try {lower}.",
            )
        else:
            yield "good", "The loss has fallen", f"{change}."
    if skipped := int(max(run.values("skipped"), default=0)):
        late = skipped - int(run.values("skipped")[-10:][0])
        tone = (
            "bad" if skipped > 0.1 * run.step else "warn" if skipped > 0.01 * run.step else "note"
        )
        text = f"{skipped:,} of {run.step:,}, {late:,} of them lately: their gradients were not finite. "
        text += "A few, early, are normal in float16" + (
            "." if tone == "note" else f"; for so many, try {lower}."
        )
        yield tone, "Steps were skipped", text
    diagonal, rest = run.lately("diagonal_mean"), run.lately("off_diagonal_rms")
    if diagonal is not None and rest is not None:
        batch = run.setting("batch_size")
        chance = f"; {batch**-0.5:.2g} is chance in a batch of {batch:.0f}" if batch else ""
        text = f"The diagonal of C is at {diagonal:.2f} (goal 1), the rest at {rest:.2g} RMS (goal 0{chance})."
        late = run.step > (run.steps or math.inf) / 2
        if diagonal < 0.3:
            text += " A longer run, or milder distortions, may help." * late
            yield "warn" if late else "note", "The views do not agree yet", text
        elif rest > 0.4:
            yield (
                "warn",
                "The dimensions repeat each other",
                f"{text} A higher --lambd drives them apart.",
            )
        else:
            yield "good", "The views agree", text


def _features(run: Run) -> Iterator[Finding]:
    """Do they differ from image to image? Their rank may sink at the start, while order arises."""
    said, tones = [], set()
    for name, what in (("effective_rank", "effective rank"), ("feature_deviation", "deviation")):
        if values := run.values(name):
            now, before = median(values[-10:]), max(values[len(values) // 2 :])
            least = (
                2.0 if name == "effective_rank" else 0.05 * max(values)
            )  # a rank of 1 is a single direction
            tones.add("bad" if now < least else "warn" if now < 0.5 * before else "good")
            said.append(f"{what} {now:.3g}, {max(values):.3g} at most")
    figures = "; ".join(said)
    if "bad" in tones:
        text = f"All images have nearly the same features ({figures}), and it does not recover from that."
        yield (
            "bad",
            "Collapsed",
            f"{text} Begin again with a lower --lr or a longer --warmup-epochs.",
        )
    elif "warn" in tones:
        yield (
            "warn",
            "The features get poorer",
            f"It may be about to collapse ({figures}): a lower --lr prevents that.",
        )
    elif tones:
        yield "good", "The features differ between images", f"Their {figures}."


def _accuracy(run: Run) -> Iterator[Finding]:
    if len(scores := run.values("knn_top1")) > 1:
        text = f"Top-1: {scores[0]:.1f} % at first, {max(scores):.1f} % at best, {scores[-1]:.1f} % now."
        rises = scores[0] < scores[-1] > 0.9 * max(scores)
        yield (
            ("good", "kNN accuracy rises", text)
            if rises
            else ("warn", "kNN accuracy does not rise", text)
        )
    names = ("trained", "untrained", "pixels", "colour")
    final = {
        name: score
        for name in names
        if (score := _number(run.summary.get(f"knn_top1_{name}"))) is not None
    }
    if "trained" in final and len(final) > 1:
        text = "kNN top-1 at the end: " + ", ".join(
            f"{name} {score:.1f} %" for name, score in final.items()
        )
        if final.pop("trained") > max(final.values()):
            yield "good", "It has learned", f"{text}."
        else:
            yield (
                "warn",
                "It has learned nothing that plain features do not know",
                f"{text}: look at the views below.",
            )


def _feeding(run: Run) -> Iterator[Finding]:
    if waits := run.values("data_wait_fraction")[1:][-10:]:  # the first line tells of the start
        text = f"{median(waits):.1%} of the time is spent waiting for data."
        if median(waits) > STARVED:
            yield (
                "warn",
                "Starved",
                f"{text} `python -m bench` says what binds, and what would help.",
            )
        else:
            yield "good", "Fed", text
    if bad := int(max(run.values("bad_images"), default=0)):
        share = f"{bad:,}" + (f" of {images:,.0f}" if (images := run.setting("images")) else "")
        tone = "warn" if bad > 0.01 * (images or 0) else "note"
        yield (
            tone,
            "Images do not decode",
            f"{share}: others stand in for them. The run has named them.",
        )
    said: dict[str, list[int]] = {}
    for row in run.rows:
        if isinstance(row.get("warning"), str):
            said.setdefault(row["warning"], []).append(row["step"])
    for text, at in list(said.items())[-10:]:
        often = (
            f"{len(at)} times, from step {at[0]:,} to {at[-1]:,}"
            if len(at) > 1
            else f"at step {at[0]:,}"
        )
        yield "warn", f"Warned {often}", text
