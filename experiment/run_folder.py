"""The folder of a run: checked, claimed and described; and the state that a run starts from."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .atomic_write import write_json
from .console import Console
from .signals import PREEMPTED

if TYPE_CHECKING:
    from PIL.Image import Image

    from model import Checkpoints, Distributed

    from .config import RunConfig

_BEFORE_CONFIG = {".lock", "config.json.tmp", "preempted"}  # files that can precede config.json

State = dict[str, Any]  # of a checkpoint


def check(folder: Path) -> None:
    """ValueError unless `folder` is new, empty, or the folder of a run."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: --run-folder needs a folder")
    names = {path.name for path in folder.iterdir()}
    if names - _BEFORE_CONFIG and "config.json" not in names:
        raise ValueError(
            f"{folder} contains files that are not those of a run: --run-folder needs a new folder"
        )


def restore(
    folder: Path,
    checkpoints: Checkpoints,
    config: RunConfig,
    settings: dict[str, Any],
    console: Console,
    distributed: Distributed,
) -> State | None:
    """The state that the run continues from, on every rank; None if it starts from nothing.

    Rank 0 chooses the file and checks it. The other ranks read the same file themselves; only if
    one of them cannot (another machine without a shared file system), the state is sent to all of
    them, which takes longer.

    Of a new run, the folder is empty afterwards.

    Raises:
        ValueError: If there is nothing to resume, if the configuration is not the saved one and
            --accept-changes is not given, or if a file to continue from does not fit.
    """
    state: State | None = None
    path: Path | None = None
    if distributed.is_rank0:
        state, path = _choose_start(folder, checkpoints, config, settings, console)
    if distributed.size == 1:
        return state
    path, digest = distributed.from_rank0(lambda: (path, None if path is None else _digest(path)))
    if path is None:
        return None
    if not distributed.is_rank0:
        state = _read_copy(path, digest, config, settings)
    if distributed.all_ranks(state is not None):
        return state
    console.print(f"{path} cannot be read on every machine: rank 0 sends it to the others")
    return distributed.from_rank0(lambda: state)


def _choose_start(
    folder: Path,
    checkpoints: Checkpoints,
    config: RunConfig,
    settings: dict[str, Any],
    console: Console,
) -> tuple[State | None, Path | None]:
    """The state to start from, and the file that it comes from; (None, None) to start anew."""
    from model import configuration_changes, continue_from

    can_resume = any(folder.glob("checkpoint*.pt"))
    if not config.resume and not (config.resume_if_saved and can_resume):
        source = config.continue_from
        # Before the earlier run is moved: a file that does not fit ends this one.
        state = None if source is None else continue_from(source, settings)
        moved = make_room(folder)
        if moved is not None:
            console.print(f"the run that was in {folder} is now in {moved}")
        if source is not None:
            console.print(f"starts with the weights in {source}")
        return state, source

    state, passed_over = checkpoints.load()
    for line in passed_over:
        console.print(line)
    changes = configuration_changes(state.get("settings", {}), settings)
    if changes and not config.accept_changes:
        raise ValueError(
            f"{checkpoints.path} was saved with other settings ({'; '.join(changes)}): use the "
            "saved ones, or --accept-changes to continue with the new ones"
        )
    for change in changes:
        console.print(f"changed setting: {change}")
    return state, checkpoints.loaded_path


def _read_copy(
    path: Path, digest: str | None, config: RunConfig, settings: dict[str, Any]
) -> State | None:
    """The state in the file that rank 0 has chosen; None if this rank has no such file."""
    from model import continue_from, load_checkpoint

    try:
        if _digest(path) != digest:
            return None
        return (
            continue_from(path, settings) if path == config.continue_from else load_checkpoint(path)
        )
    except (ValueError, OSError):
        return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_room(folder: Path) -> Path | None:
    """Empty `folder` for a new run.

    An earlier run moves to `folder`.1, .2, ...; that path is returned.
    """
    folder = folder.absolute()
    moved = None
    if (folder / "config.json").exists():
        claim(folder).close()  # raises if that run is still using it
        candidates = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
        moved = next(path for path in candidates if not path.exists())
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def claim(folder: Path) -> IO[str]:
    """Reserve the folder for this process for as long as the returned file is open.

    ValueError if another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115  # open for as long as the run lasts
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another run is still using {folder}: choose another --run-folder"
        ) from None
    return file


def describe(
    folder: Path, config: dict[str, Any], environment: dict[str, Any], views: Image | None
) -> None:
    """Write what is known of the run at its start: config.json, environment.json and views.png."""
    write_json(folder / "config.json", config)
    write_json(folder / "environment.json", environment)
    if views is not None:
        views.save(folder / "views.png")
    (folder / "correlation").mkdir(exist_ok=True)


@contextmanager
def preemptible(folder: Path) -> Iterator[None]:
    """A block in which SIGTERM may end the process, which then creates the file `preempted`.

    A file from an earlier run is removed.
    """
    (folder / "preempted").unlink(missing_ok=True)
    try:
        yield
    except SystemExit as end:
        if end.code == PREEMPTED:
            mark_preempted(folder)
        raise


def mark_preempted(folder: Path) -> None:
    """Create the file `preempted`, for schedulers: torchrun turns every exit status into 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preempted").touch()


def stopped(folder: Path, status: int, is_rank0: bool) -> int:
    """The exit status of a run that a signal has stopped, and that has saved.

    Ranks other than 0 exit with 0: if they failed, torchrun would kill rank 0 while it may still be
    saving.

    Args:
        folder: The folder of the run.
        status: What the signal asks for; 0 if another rank has received it.
        is_rank0: Whether this is rank 0.
    """
    if not is_rank0:
        return 0
    status = status or PREEMPTED
    if status == PREEMPTED:
        mark_preempted(folder)
    return status
