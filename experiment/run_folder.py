"""The folder of a run: whose it is, what an earlier run left there, and what this one goes on from."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .console import Console
from .files import write_json
from .presets import RunConfig
from .signals import PREEMPTED

_FIRST = {
    ".lock",
    "config.json.tmp",
    "preempted",
}  # what a run can leave there before its config.json

if TYPE_CHECKING:
    from PIL.Image import Image

    from model import Checkpoints


def check(folder: Path) -> None:
    """ValueError where `folder` is anything but new, empty, or the folder of a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --run-folder wants a folder")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there - _FIRST and "config.json" not in there:
        raise ValueError(
            f"{folder} holds something else than a run: --run-folder wants a new folder"
        )


def saved(
    folder: Path,
    checkpoints: Checkpoints,
    config: RunConfig,
    settings: dict[str, Any],
    console: Console,
) -> dict[str, Any] | None:
    """What the run goes on from; None for one from nothing. Of a new one, the folder is then empty.

    ValueError where there is nothing to resume, or another configuration without --accept-changes, or a file to
    continue from that does not fit.
    """
    from model import configuration_changes, continue_from

    if not config.resume and not (config.resume_if_saved and any(folder.glob("checkpoint*.pt"))):
        source = config.continue_from
        begun = continue_from(source, settings) if source else None  # before anything is moved
        if moved := make_room(folder):
            console.print(f"the run that was in {folder} is now in {moved}")
        if begun:
            console.print(f"begins with what {source} holds")
        return begun
    state, passed_over = checkpoints.load()
    for line in passed_over:
        console.print(line)
    changes = configuration_changes(state.get("settings", {}), settings)
    if changes and not config.accept_changes:
        raise ValueError(
            f"{checkpoints.path} has another configuration: resume it with its own, or take this one from here on by "
            f"--accept-changes: {'; '.join(changes)}"
        )
    for change in changes:
        console.print(f"from here on, {change}")
    return state


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


def claim(folder: Path) -> IO[str]:
    """Takes the folder for this process: keep the file open. ValueError where another run is using it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"a run that is still going on is using {folder}: choose another --run-folder"
        ) from None
    return file


@contextmanager
def preemptible(folder: Path) -> Iterator[None]:
    """A block that may end by being told to make room: `leave` then says so in the folder, now and not from before."""
    (folder / "preempted").unlink(missing_ok=True)
    try:
        yield
    except SystemExit as end:
        if end.code == PREEMPTED:
            leave(folder, PREEMPTED)
        raise


def describe(
    folder: Path, config: dict[str, Any], environment: dict[str, Any], views: Image | None
) -> None:
    """What is known of the run at its start."""
    write_json(folder / "config.json", config)
    write_json(folder / "environment.json", environment)
    if views is not None:
        views.save(folder / "views.png")
    (folder / "correlation").mkdir(exist_ok=True)


def leave(folder: Path, status: int) -> int:
    """The exit status. One that torchrun would not pass on stands in the folder as well: `preempted`.

    Of the first rank: the others end with 0. Failing, they would have it killed while it may still be saving.
    """
    if status == PREEMPTED:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preempted").touch()
    return status
