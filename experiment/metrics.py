"""The numbers that a run logs: `metrics.jsonl`, and TensorBoard's event files where tensorboard is
installed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .atomic_write import finite, write_text


class Metrics:
    """Writes `metrics.jsonl`: one JSON object per line for each logged step.

    If tensorboard is installed, the numbers are also written as events into the folder
    `tensorboard` beside the file. Use it as a context manager.

    Args:
        path: The file.
        step: First step of this run. A resumed run keeps the lines of earlier steps; a new one
            starts an empty file.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [values for values in read_metrics(path) if values["step"] < step] if step else []
        write_text(path, "".join(map(_line, kept)))
        self._files = ExitStack()
        self._file = self._files.enter_context(path.open("a", buffering=1))
        self._write_event = _event_writer(path.with_name("tensorboard"), step, self._files)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # of lines that a full disk has refused already
            self._files.close()

    def write(self, step: int, values: dict[str, float | str | None]) -> None:
        """Log the values of a step."""
        self._file.write(_line({"step": step, **values}))
        numbers = [
            {"tag": name, "simple_value": value}
            for name, value in values.items()
            if isinstance(value, (int, float))
        ]
        self._write_event(step=step, summary={"value": numbers})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; [] if there is no file.

    An incomplete last line, which a killed run leaves, is ignored.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _line(values: dict[str, Any]) -> str:
    return json.dumps(finite(values)) + "\n"


def _event_writer(folder: Path, step: int, files: ExitStack) -> Callable[..., None]:
    """A function that writes the fields of a TensorBoard event.

    It does nothing if tensorboard is not installed.

    torch's SummaryWriter is not used: it starts a thread, and imports tensorflow if that is
    installed, which takes 15 s.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        return lambda **fields: None
    folder.mkdir(exist_ok=True)
    # TensorBoard reads event files in the order of their names.
    name = f"events.out.tfevents.{len(os.listdir(folder)):06}"
    records = RecordWriter(files.enter_context((folder / name).open("wb", buffering=0)))

    def write(**fields: Any) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    write(file_version="brain.Event:2")
    # Events of earlier files from this step on are not shown.
    write(step=step, session_log={"status": "START"})
    return write
