"""Checkpoints that are written whole or not at all, checked when read, and never run code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

# torch files are zip archives. The digest of one is its comment, whose length stands before it: in a fresh file, 0.
_NO_COMMENT, _MARK = b"\0\0", (7 + 64).to_bytes(2, "little") + b"sha256:"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) to `path`, replacing it only once everything is on the disk.

    The file stays one that `torch.load` reads. OSError (a full disk) leaves what was at `path` as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    write_atomically(path, archive[:-2], _MARK, hashlib.sha256(archive).hexdigest().encode())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state saved at `path`. ValueError where the file is absent, damaged, or not a checkpoint of ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; there is nothing to resume from") from None
    archive, mark, digest = data[: -len(_MARK) - 64], data[-len(_MARK) - 64 : -64], data[-64:]
    if mark != _MARK or hashlib.sha256(archive + _NO_COMMENT).hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged or no checkpoint of twinfeed: its checksum does not hold")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is no checkpoint of twinfeed: it holds more than tensors and plain values") from None
    return state


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file that is either all there or not there: to a temporary name, to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is overwritten
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, which does not say what it was writing
        raise OSError(error.errno, f"{error.strerror}; what was there before is unchanged", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def configuration_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each setting that differs between two configurations."""
    return [
        f"{name}: {saved.get(name, 'not set')} when it was saved, {current.get(name, 'not set')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
