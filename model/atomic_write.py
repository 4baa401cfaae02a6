"""Atomic file writes: a file is replaced only when the new one is completely on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` completely or not at all.

    Raises:
        OSError: writing failed, for example because the disk is full. A file that was at `path`
            before is unchanged.
    """
    with replace_atomically(path) as file:
        file.write(data)


@contextmanager
def replace_atomically(path: Path, superseded: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    The file is flushed to the disk before it is renamed. Between the two renames, no file exists at
    `path`.

    Args:
        path: The file to write or replace.
        superseded: New name for the file that is at `path` now. By default that file is deleted.

    Raises:
        OSError: writing failed. The message contains `path`, and the file at `path` is unchanged.
    """
    # The temporary name is fixed, so that the next write overwrites what a killed process left.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

        if superseded is not None and path.exists():
            os.replace(path, superseded)
        os.replace(temporary, path)
    except OSError as error:
        _remove_quietly(temporary)
        # The error of a full disk does not contain the name of the file.
        message = f"{error.strerror}; the file that was there before is unchanged"
        raise OSError(error.errno, message, str(path)) from error
    except BaseException:
        _remove_quietly(temporary)
        raise

    _sync_folder(path.parent)


def _remove_quietly(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush the renames to the disk, on file systems that can flush a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
