"""What a run says: live progress, messages, `metrics.jsonl` and TensorBoard, `environment.json`, `summary.json`.

python -m runlog RUN    writes RUN/report.html, the page about a run, while it runs or afterwards
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from provenance import environment as environment

T = TypeVar("T")

_QUIET_S = 10.0  # where there is no terminal: seconds between two lines about the same thing


class RunLog:
    """Talks to the person at the terminal, or in plain lines to whatever stands in its place."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be in the terminal's encoding
        self.console = _Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bars = _BarsAboveReadings(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )

    def __enter__(self) -> RunLog:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def say_rejects(self, what: str, rejects: dict[str, str], said: int = 0, most: int = 10) -> int:
        """A line for each image after the first `said`, up to `most` of them; returns how many there are."""
        new = list(rejects.items())[said:]
        for name, reason in new[:most]:
            self.say(f"{what} {printable(name)}: {reason}")
        if len(new) > most:
            self.say(f"{what} {len(new) - most} more")
        return len(rejects)

    @contextmanager
    def bar(self, description: str) -> Iterator[Bar]:
        """A progress bar for the length of the block; call it with (done, total) or (done, total, reading)."""
        task = self._bars.add_task(description, total=None, reading="")
        try:
            yield Bar(self, self._bars, task, description)
        finally:
            self._bars.remove_task(task)

    def table(self, rows: dict[str, Any]) -> None:
        grid = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
        for name, value in rows.items():
            grid.add_row(name, Text(f"{value:.4g}" if isinstance(value, float) else printable(str(value))))
        self.console.print(grid)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody listens any more (`train.py | head`): train on in silence. rich would end the program, unsaved."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _BarsAboveReadings(Progress):
    """Bars, and below them what was last read: both at once are too wide for many a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(f"  {task.fields['reading']}") for task in self.tasks if task.fields["reading"])


class Bar:
    """One bar, or its lines now and then."""

    def __init__(self, log: RunLog, bars: Progress, task: TaskID, description: str) -> None:
        self._log, self._bars, self._task, self._description = log, bars, task, description
        self._said_at = 0.0

    def __call__(self, done: int, total: int, reading: str = "") -> None:
        self._bars.update(self._task, completed=done, total=total, reading=reading)
        if not self._log.live and time.monotonic() - self._said_at > _QUIET_S:
            self._said_at = time.monotonic()
            self._log.say(f"{self._description} {done}/{total} {reading}")


def counted(batches: Iterable[T], total: int, bar: Bar) -> Iterator[T]:
    """The batches, each counted on the bar once it is done with."""
    for done, batch in enumerate(batches, 1):
        yield batch
        bar(done, total)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C (and SIGTERM) only asks to stop: the step is finished and saved. Twice means at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Metrics:
    """`metrics.jsonl`: a line of values for every so many steps. A resumed run goes on with what it had at `step`.

    Where tensorboard is installed its numbers are also written for that, into the folder beside it.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [_line(values) for values in read_metrics(path) if values["step"] < step] if step else []
        temporary = path.with_name(path.name + ".tmp")  # killed while it rewrites them, a run still has its metrics
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
        numbers = [{"tag": k, "simple_value": v} for k, v in values.items() if isinstance(v, (int, float))]
        self._events(step=step, summary={"value": numbers})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without one that was torn when its run was killed; [] where there is none."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [values for values in found if isinstance(values, dict) and isinstance(values.get("step"), int)]


def _line(values: dict[str, Any]) -> str:
    """Of JSON, which has no word for what is not a finite number: null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
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
    write(step=step, session_log={"status": "START"})  # whatever earlier files have from this step on is not shown
    return write


def check_finite(loss: float, step: int) -> None:
    """FloatingPointError where training has diverged; called before each save: a checkpoint is always a good one."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}: try a lower --lr")


def explain(error: Exception) -> str:
    """What ended the program, what helps, and where to go on from (see `LastStep`), in one line."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        said = f"out of memory: {said or 'on the host'}; free some, or begin again with a smaller --batch-size"
    elif not isinstance(error, (ValueError, OSError, FloatingPointError)):  # what nobody but us can have done wrong
        said = f"{type(error).__name__}: {said} (TWINFEED_TRACEBACK=1 shows where)"
    return "; ".join([said, *getattr(error, "__notes__", ())[-1:]])


def printable(name: str) -> str:
    """A name with line ends, terminal codes and undecodable bytes spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def check_run_folder(folder: Path) -> None:
    """ValueError where `folder` is anything but new, empty, or the folder of a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --run wants a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds something else than a run: --run wants a new folder")


def claim(folder: Path) -> IO[str]:
    """Takes the folder for this process: keep the file open. ValueError where another run is using it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"a run that is still going on is using {folder}: choose another --run") from None
    return file


def make_room(folder: Path) -> Path | None:
    """An empty `folder` for a new run. What an earlier one left there moves to `folder`.1, .2, ...: returned."""
    folder, moved = folder.absolute(), None
    if (folder / "config.json").exists():
        claim(folder).close()  # not from under a run that is still going on
        free = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
        moved = next(path for path in free if not path.exists())
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def reading(values: dict[str, float]) -> str:
    """The numbers of a step in one line, for the progress bar."""
    if not values:
        return ""
    return (
        f"loss {values['loss']:.4g} (invariance {values['invariance']:.4g}, redundancy {values['redundancy']:.4g}), "
        f"diagonal {values['diagonal_mean']:.2f}, off-diagonal {values['off_diagonal_rms']:.3f}, "
        f"{values['images_per_s']:.0f} images/s, data wait {values['data_wait_fraction']:.0%}"
    )


class Feed:
    """Hands out batches of `batch_size` images, and knows how many came and how long they had to be waited for."""

    def __init__(self, batches: Iterator[Any], batch_size: int, before: dict[str, Any] | None = None) -> None:
        """before: the `state` of the run that this one goes on with."""
        self._batches, self._batch_size = batches, batch_size
        before = before or {"images": 0, "wait_s": 0.0, "elapsed_s": 0.0}
        self._images, self._wait_s = before["images"], before["wait_s"]
        self._read_at = time.monotonic()
        self._began = self._read_at - before["elapsed_s"]
        self._read = (self._images, self._wait_s)

    def __iter__(self) -> Feed:
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
        return {"images": self._images, "wait_s": self._wait_s, "elapsed_s": time.monotonic() - self._began}

    def total(self) -> dict[str, float]:
        """Since the beginning."""
        return _rates(self._images, self._wait_s, time.monotonic() - self._began)


def _rates(images: int, wait_s: float, elapsed_s: float) -> dict[str, float]:
    return {"images_per_s": images / elapsed_s, "data_wait_fraction": wait_s / elapsed_s}


if __name__ == "__main__":
    import report

    report.main()
