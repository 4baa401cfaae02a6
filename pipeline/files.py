"""Atomic writes: a file is complete or absent, whatever happens to the process that writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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
