"""What a run says: live progress, messages, `metrics.jsonl` and TensorBoard, `environment.json`, `summary.json`.

python -m runlog RUN    writes RUN/report.html, the page about a run, while it runs or afterwards
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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

T = TypeVar("T")

INTERRUPTED = 130  # exit status of a run that was stopped by Ctrl-C, and saved
PREEMPTED = 75  # of one that was told to make room, and saved: EX_TEMPFAIL, try again later
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # the signals that say so

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
        """A line for each image after the first `said`, up to `most` of them; returns how many there are.

        Each rank finds its own, and says so itself.
        """
        quiet, self.console.quiet = self.console.quiet, False
        new = list(rejects.items())[said:]
        for name, reason in new[:most]:
            self.say(f"{what} {printable(name)}: {reason}")
        if len(new) > most:
            self.say(f"{what} {len(new) - most} more")
        self.console.quiet = quiet
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
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block Ctrl-C, SIGTERM and SIGUSR1 only ask to stop: the step is finished and saved.

    Yields what the exit status is to be, 0 until one has come. Ctrl-C twice means at once. (A second that comes within
    a second is the first: torchrun passes on what the terminal has sent to all of its processes already.)
    """
    asked, asked_at = 0, 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal asked, asked_at
        if asked and number == signal.SIGINT and time.monotonic() - asked_at > 1:
            raise KeyboardInterrupt
        asked, asked_at = INTERRUPTED if number == signal.SIGINT else PREEMPTED, time.monotonic()

    before = signal.signal(signal.SIGINT, ask)
    for number in PREEMPTION:
        signal.signal(number, ask)
    yield lambda: asked
    signal.signal(signal.SIGINT, before)
    for number in PREEMPTION:  # not after a fault: torchrun's SIGTERM must not come before it is said
        signal.signal(number, _make_room)


def _make_room(number: int, frame: object) -> None:
    sys.exit(PREEMPTED)


_NOT_OURS = (ValueError, OSError, FloatingPointError)  # faults that somebody else than us can have made


def first_rank() -> bool:
    """Whether this process speaks for those that torchrun has started with it."""
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[RunLog], int]) -> int:
    """What `main` returns, or the exit status of a fault: said in one line, among several ranks by the first to fail.

    A fault that is nobody's but ours is shown with its traceback among several ranks: who was it, and where?
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if not several:  # until there is something to save. (What waits for other ranks would not hear of it, and to them
        for number in PREEMPTION:  # torchrun says the same where one has failed: that is no reason to come again.)
            signal.signal(number, _make_room)
    log = RunLog()
    log.console.quiet = not first_rank()
    try:
        with log:
            return main(log)
    except Exception as error:
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        if isinstance(error, ConnectionError) and not first_rank():
            return 1  # the rank that failed says why, and the first one where to go on from
        if several and not isinstance(error, _NOT_OURS):
            traceback.print_exc()
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        if end.code == 2 and not first_rank():  # the command line is wrong, which the first rank still has to say:
            time.sleep(10)  # torchrun ends all as soon as one has ended
        raise
    finally:
        for number in PREEMPTION:
            signal.signal(number, signal.SIG_IGN)  # the exit status stands, and nothing is left to be stopped


def explain(error: Exception) -> str:
    """What ended the program, what helps, and where to go on from (see `LastStep`), in one line."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        said = f"out of memory: {said or 'on the host'}; free some, or begin again with a smaller --batch-size"
    elif not isinstance(error, _NOT_OURS):
        said = f"{type(error).__name__}: {said} (TWINFEED_TRACEBACK=1 shows where)"
    return "; ".join([said, *getattr(error, "__notes__", ())[-1:]])


def printable(name: str) -> str:
    """A name with line ends, terminal codes and undecodable bytes spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(values), indent=2, default=str) + "\n")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """null for what is not a finite number, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


SKIPPED_IN_A_ROW = 16  # steps that end a run: as often as float16's first scale can halve before it is 1


def diverged(step: int, loss: float, in_a_row: int) -> str:
    """Why a run ends that does not learn any more."""
    skipped = f", the last of {in_a_row} steps in a row that were skipped, their gradients not being finite" * (
        in_a_row > 1
    )
    return f"the loss is {loss} at step {step}{skipped}: try a lower --lr. checkpoint.pt is from before that"


def outlook(peak: int, largest: int, images: int, seconds: float, device: str, ranks: int) -> dict[str, str]:
    """What a whole run will take. peak: bytes of each rank; largest: a batch of the `images`; seconds: of the run."""
    hours = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    gpu_hours = "" if device.endswith("cores") else f", {ranks * seconds / 3600:,.1f} GPU-hours"
    fits = f"about {largest:,}" if largest < images else f"all {images:,}"
    return {
        "peak memory": f"{peak / 1e9:.1f} GB" + " on each rank" * (ranks > 1),
        "largest batch": f"{fits} images in one step would fit",
        "the whole run": f"about {hours}{gpu_hours} on {device}, as fast as the second step",
    }


def reading(values: dict[str, float]) -> str:
    """The numbers of a step in one line, for the progress bar."""
    if not values:
        return ""
    return (
        f"loss {values['loss']:.4g} (invariance {values['invariance']:.4g}, redundancy {values['redundancy']:.4g}), "
        f"diagonal {values['diagonal_mean']:.2f}, off-diagonal {values['off_diagonal_rms']:.3f}, "
        f"{values['images_per_s']:.0f} images/s, data wait {values['data_wait_fraction']:.0%}"
    )


if __name__ == "__main__":
    import report

    report.main()
