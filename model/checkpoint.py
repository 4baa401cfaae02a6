"""Checkpoints that are written whole or not at all, checked when read, and never run code."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64  # torch files are zip archives; the digest of all before it is the archive's comment


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) to `path`, replacing it only once everything is on the disk.

    The file stays one that `torch.load` reads. OSError (a full disk) leaves what was at `path` as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    comment = _MARK + hashlib.sha256(archive).hexdigest().encode()
    write_atomically(path, archive[:-2], _COMMENT_BYTES.to_bytes(2, "little"), comment)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state saved at `path`. ValueError where the file is absent, damaged, or not a checkpoint of ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; there is nothing to resume from") from None
    archive, mark, digest = data[:-_COMMENT_BYTES], data[-_COMMENT_BYTES:-64], data[-64:]
    if mark != _MARK or hashlib.sha256(archive[:-2] + b"\0\0").hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged or no checkpoint of twinfeed: its checksum does not hold")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return state


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file that is either all there or not there: to a temporary name, to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def configuration_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each setting that differs between two configurations."""
    return [
        f"{name}: {saved.get(name, 'not set')} when it was saved, {current.get(name, 'not set')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
