"""The numbers of a run: `metrics.jsonl`, TensorBoard where it is installed, and how fast images come."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any


class Metrics:
    """`metrics.jsonl`: a line of values for every so many steps. A resumed run goes on with what it had at `step`.

    Where tensorboard is installed its numbers are also written for that, into the folder beside it.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = (
            [_line(values) for values in read_metrics(path) if values["step"] < step]
            if step
            else []
        )
        temporary = path.with_name(
            path.name + ".tmp"
        )  # killed while it rewrites them, a run still has its metrics
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._files = ExitStack()  # closed by __exit__
        self._file = self._files.enter_context(path.open("a", buffering=1))
        self._events = _event_writer(path.with_name("tensorboard"), step, self._files)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # of lines that a full disk has refused already
            self._files.close()

    def write(self, step: int, **values: float | str | None) -> None:
        self._file.write(_line({"step": step, **values}))
        numbers = [
            {"tag": k, "simple_value": v} for k, v in values.items() if isinstance(v, (int, float))
        ]
        self._events(step=step, summary={"value": numbers})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without one that was torn when its run was killed; [] where there is none."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [
        values
        for values in found
        if isinstance(values, dict) and isinstance(values.get("step"), int)
    ]


def _line(values: dict[str, Any]) -> str:
    """Of JSON, which has no word for what is not a finite number: null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    return json.dumps(finite) + "\n"


def _event_writer(folder: Path, step: int, files: ExitStack) -> Callable[..., None]:
    """Writes the fields of a TensorBoard event. (torch's SummaryWriter is a thread, and imports tensorflow: 15 s.)"""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        return lambda **fields: None
    folder.mkdir(exist_ok=True)
    name = f"events.out.tfevents.{len(os.listdir(folder)):06}"  # read in the order of their names
    records = RecordWriter(files.enter_context((folder / name).open("wb", buffering=0)))

    def write(**fields: Any) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    write(file_version="brain.Event:2")
    write(
        step=step, session_log={"status": "START"}
    )  # whatever earlier files have from this step on is not shown
    return write


class ThroughputMeter:
    """Hands out batches of `batch_size` images, and knows how many came and how long they had to be waited for."""

    def __init__(
        self, batches: Iterator[Any], batch_size: int, before: dict[str, Any] | None = None
    ) -> None:
        """before: the `state` of the run that this one goes on with."""
        self._batches, self._batch_size = batches, batch_size
        before = before or {"images": 0, "wait_s": 0.0, "elapsed_s": 0.0}
        self._images, self._wait_s = before["images"], before["wait_s"]
        self._read_at = time.monotonic()
        self._began = self._read_at - before["elapsed_s"]
        self._read = (self._images, self._wait_s)

    def __iter__(self) -> ThroughputMeter:
        return self

    def __next__(self) -> Any:
        asked = time.monotonic()
        batch = next(self._batches)
        self._wait_s += time.monotonic() - asked
        self._images += self._batch_size
        return batch

    def rates(self) -> dict[str, float]:
        """Since the last call."""
        (images, wait_s), self._read = self._read, (self._images, self._wait_s)
        began, self._read_at = self._read_at, time.monotonic()
        return _rates(self._images - images, self._wait_s - wait_s, self._read_at - began)

    def state(self) -> dict[str, Any]:
        return {
            "images": self._images,
            "wait_s": self._wait_s,
            "elapsed_s": time.monotonic() - self._began,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block is nobody's."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began
        self._read_at += time.monotonic() - began

    def total(self) -> dict[str, float]:
        """Since the beginning."""
        return _rates(self._images, self._wait_s, time.monotonic() - self._began)


def _rates(images: int, wait_s: float, elapsed_s: float) -> dict[str, float]:
    return {"images_per_s": images / elapsed_s, "data_wait_fraction": wait_s / elapsed_s}
