"""Reading the folder of a run: its configuration, its environment, its metrics and its status.

`health.py` judges what was read, and `report.py` shows it.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .metrics import read_metrics

Points = Sequence[tuple[int, float | None]]
"""(step, value) pairs in the order of the steps. None is a value that is not finite."""

RECENT = 10  # logged values that "recent" stands for: single batches are noisy


class RunStatus(NamedTuple):
    """The state of a run in a word, and how far it has come."""

    name: str  # finished, preempted, running or stopped
    progress: str


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]  # empty until the run has finished
    rows: list[dict[str, Any]]  # the lines of metrics.jsonl, in the order of their steps

    @property
    def steps_done(self) -> int:
        """The number of steps up to the last line of metrics.jsonl."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the whole run; None if the configuration is incomplete."""
        images = self.setting("images")
        batch_size = self.setting("batch_size")
        epochs = self.setting("epochs")
        if not (images and batch_size and epochs):
            return None
        return int(images // batch_size * epochs)

    def setting(self, name: str) -> float | None:
        """A number in the configuration; None if it is not there."""
        return finite_number(self.config.get(name))

    def points(self, metric: str, factor: float = 1.0) -> Points:
        """The values of a metric, multiplied by `factor`.

        A line without the metric gives None if its loss is not finite: the run has diverged there.
        """
        points: list[tuple[int, float | None]] = []
        for row in self.rows:
            value = finite_number(row.get(metric))
            if value is not None:
                points.append((row["step"], factor * value))
            elif "loss" in row and finite_number(row["loss"]) is None:
                points.append((row["step"], None))
        return points

    def values(self, metric: str) -> list[float]:
        """The finite values of a metric."""
        return [value for _, value in self.points(metric) if value is not None]

    def recent(self, metric: str) -> float | None:
        """The median of the last ten values of a metric; None if there are no values."""
        values = self.values(metric)
        return median(values[-RECENT:]) if values else None

    def status(self) -> RunStatus:
        """Whether the run has finished, was preempted, is running or has stopped early."""
        if self.summary:
            steps = int(finite_number(self.summary.get("steps")) or self.steps_done)
            return RunStatus("finished", f"after {steps:,} steps")

        reached = f"at step {self.steps_done:,}"
        if self.total_steps:
            reached += f" of {self.total_steps:,}"
        if (self.folder / "preempted").exists():
            return RunStatus(
                "preempted", f"{reached}: stopped by a signal and saved; --resume continues it"
            )
        if self._is_locked():
            return RunStatus("running", reached + self._time_left())
        return RunStatus("stopped", f"{reached}; --resume continues from the last checkpoint")

    def _is_locked(self) -> bool:
        """Whether a process holds the lock of the folder, as a run does while it trains."""
        with suppress(FileNotFoundError), open(self.folder / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _time_left(self) -> str:
        images_per_s = self.recent("images_per_s")
        batch_size = self.setting("batch_size")
        if not (self.total_steps and batch_size and images_per_s):
            return ""
        images_left = (self.total_steps - self.steps_done) * batch_size
        minutes = round(images_left / images_per_s / 60)
        return f", {minutes // 60} h {minutes % 60:02} min left"


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run that has finished or is still running.

    Files that are missing or incomplete are left out.

    Raises:
        ValueError: `folder` is not the folder of a run.
    """
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise ValueError(
            f"{folder} is not the folder of a run: it contains neither config.json nor "
            "metrics.jsonl; name a folder that train.py has written"
        )
    return RunRecord(
        folder,
        config=_read_json(folder / "config.json"),
        environment=_read_json(folder / "environment.json"),
        summary=_read_json(folder / "summary.json"),
        rows=sorted(read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"]),
    )


def finite_number(value: object) -> float | None:
    """The value as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none."""
    with suppress(OSError, ValueError):
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
    return {}
