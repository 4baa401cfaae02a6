"""Checkpoints that are written whole or not at all, also when a fault ends a run; checked when read, never run code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


class LastStep:
    """The last completed step of a training loop, which a fault in the next one does not take away.

    Around the loop, it has that step saved by `write(step)` to `path` when an exception ends it, and notes on the
    exception where to go on from. (Not on a FloatingPointError: what has diverged would again.) `path` None: never.
    """

    def __init__(self, network: nn.Module, write: Callable[[int], None], path: Path | None, step: int) -> None:
        self._write, self._path, self._done, self._saved, self._whole = write, path, step, step, True
        self.saved_at = time.monotonic()
        # Batch norm's averages, which the forward pass changes: by type, so that each copy is one operation.
        types = [[b for b in network.buffers() if b.is_floating_point() is floating] for floating in (True, False)]
        self._buffers = [(buffers, [b.clone() for b in buffers]) for buffers in types if buffers]

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the optimizer's step: in there the weights belong to no step, and a fault leaves nothing to save."""
        self._whole = False
        yield
        for buffers, kept in self._buffers:
            torch._foreach_copy_(kept, buffers)
        self._done, self._whole = self._done + 1, True

    def save(self) -> None:
        if self._path is not None:
            self._write(self._done)
        self._saved, self.saved_at = self._done, time.monotonic()

    def __enter__(self) -> LastStep:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, FloatingPointError) and self._path is not None:
            error.add_note(f"it ended after step {self._done:,}{self._rescue()}")

    def _rescue(self) -> str:
        lost = ""
        if not self._whole:
            lost = ", in the middle of the next update"
        elif self._done > self._saved:
            try:
                for buffers, kept in self._buffers:
                    torch._foreach_copy_(buffers, kept)
                self.save()
            except Exception as reason:
                lost = f", which cannot be saved ({(str(reason) or repr(reason)).splitlines()[0]})"
        if not self._saved:
            return f"{lost}: nothing is saved to go on from"
        which = f"{lost}: step {self._saved:,}" if lost else ", which"
        return f"{which} is saved in {self._path}: --resume goes on from there"


def configuration_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each setting that differs between two configurations."""
    return [
        f"{name}: {saved.get(name, 'not set')} when it was saved, {current.get(name, 'not set')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
