"""Atomic writes: a file or folder is complete or absent, whatever happens to the process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LEFTOVER_AGE_S = 3600.0  # a temporary folder untouched for so long belongs to a dead process


@contextmanager
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an exception.

    The data go to a temporary file beside `path`, which is removed if the block raises. A process
    that is killed leaves the old file or the new one, and perhaps the temporary file.

    Args:
        path: The file to write. Its folder must exist.
        concurrent: Whether several processes may write `path` at the same time, as they do in the
            cache folder. The name of the temporary file then includes the process id. Without it,
            the next write reuses what a killed process left.
    """
    writer = f".{os.getpid()}" if concurrent else ""
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def create_folder_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist, create it with the content that `fill` writes.

    `fill` gets an empty temporary folder beside `folder`, which is renamed in the end. If several
    processes do this at once, the first to finish wins, and the others use its folder.
    """
    if folder.is_dir():
        return folder
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f".{folder.name}-*"):
        if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(leftover, ignore_errors=True)

    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            os.replace(temporary, folder)
        except OSError:
            overtaken = folder.is_dir()
            if not overtaken:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
