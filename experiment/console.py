"""What a command prints: messages, tables and live progress bars, or plain lines where there is no
terminal.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import rich.console
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

_SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
_MOST_REJECTS = 10  # images that are named one by one


class Console:
    """Prints for a person at a terminal, or plain lines for whatever stands in its place.

    Use it as a context manager: progress bars are drawn within the block.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files need not be in the terminal's encoding.
            sys.stdout.reconfigure(errors="backslashreplace")
        self.rich = _RichConsole(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.live = self.rich.is_terminal and not self.rich.is_dumb_terminal
        self._bars = _ProgressWithStatus(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            disable=not self.live,
        )

    def __enter__(self) -> Console:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @property
    def quiet(self) -> bool:
        """Whether nothing is printed, as on every rank but rank 0."""
        return self.rich.quiet

    @quiet.setter
    def quiet(self, quiet: bool) -> None:
        self.rich.quiet = quiet

    def print(self, text: str) -> None:
        """Print a line of plain text; markup in it is not interpreted."""
        self.rich.print(text, markup=False)

    def print_rejects(self, what: str, rejects: dict[str, str], printed: int = 0) -> int:
        """Print a line for each image that cannot be used, the first ten of them; return their
        number.

        Each rank finds its own bad images, so this is printed even where the console is quiet.

        Args:
            what: What was done with them: "left out" or "replaced".
            rejects: The reason for each name.
            printed: How many of `rejects`, the first ones, have been printed before.
        """
        quiet, self.quiet = self.quiet, False
        new = list(rejects.items())[printed:]
        for name, reason in new[:_MOST_REJECTS]:
            self.print(f"{what} {printable(name)}: {reason}")
        if len(new) > _MOST_REJECTS:
            self.print(f"and {len(new) - _MOST_REJECTS} more")
        self.quiet = quiet
        return len(rejects)

    def table(self, rows: dict[str, Any]) -> None:
        """Print names and values in two columns."""
        grid = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
        for name, value in rows.items():
            shown = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
            grid.add_row(name, Text(shown))
        self.rich.print(grid)

    @contextmanager
    def progress_bar(self, description: str) -> Iterator[ProgressBar]:
        """Show a progress bar within the block; call it with (done, total) or (done, total,
        status).
        """
        task = self._bars.add_task(description, total=None, status="")
        try:
            yield ProgressBar(self, self._bars, task, description)
        finally:
            self._bars.remove_task(task)


class ProgressBar:
    """One progress bar; without a terminal, a line every ten seconds."""

    def __init__(self, console: Console, bars: Progress, task: TaskID, description: str) -> None:
        self._console = console
        self._bars = bars
        self._task = task
        self._description = description
        self._printed_at = 0.0

    def __call__(self, done: int, total: int, status: str = "") -> None:
        self._bars.update(self._task, completed=done, total=total, status=status)
        due = time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES
        if due and not self._console.live:
            self._printed_at = time.monotonic()
            self._console.print(f"{self._description} {done}/{total} {status}")


def counted(batches: Iterable[T], total: int, bar: ProgressBar) -> Iterator[T]:
    """The same batches; each is counted on the progress bar once the consumer asks for the next."""
    for done, batch in enumerate(batches, 1):
        yield batch
        bar(done, total)


def printable(name: str) -> str:
    """A name in which line ends, terminal codes and undecodable bytes are spelled out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name
    )


class _RichConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Continue silently if nothing reads the output any more (`train.py | head`).

        rich would exit, and the run would lose what it has not saved.
        """
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ProgressWithStatus(Progress):
    """Progress bars with the status of each below them.

    Side by side they are too wide for many terminals.
    """

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["status"]:
                yield Text(f"  {task.fields['status']}")
