"""Checkpoints of a run, which are written atomically in the background and verified when read.

`Checkpoints` manages those of one run. `save_checkpoint` and `load_checkpoint` write and read a
single file. Loading never executes code from a file.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .atomic_write import replace_atomically

# torch files are zip archives. The checksum of a checkpoint is the comment of its archive. The
# length of the comment stands right before it, at the end of the file; it is 0 in a fresh archive.
_EMPTY_COMMENT = b"\0\0"
_PREFIX = b"sha256:"
_DIGEST_LENGTH = 64  # hexadecimal digits
_COMMENT_START = (len(_PREFIX) + _DIGEST_LENGTH).to_bytes(2, "little") + _PREFIX


class Checkpoints:
    """The checkpoints of one run.

    `folder/checkpoint.pt` is the newest one. Earlier ones are named after their step, like
    `checkpoint-00000123.pt`. If the process is killed at any moment, either the previous checkpoint
    or the new one can be loaded.

    Use it as a context manager, which ends its thread.

    Args:
        folder: The folder of the run.
        keep: How many checkpoints to keep, including the newest.
        milestone_steps: Also keep each checkpoint at a multiple of this many steps.

    Attributes:
        path: `folder/checkpoint.pt`.
        step: Step of the newest intact checkpoint. None before the first load or finished save.
        loaded_path: The file that the last `load` has read. None before that.
    """

    def __init__(self, folder: Path, keep: int = 3, milestone_steps: int | None = None) -> None:
        assert keep > 0
        self.path = folder / "checkpoint.pt"
        self.step: int | None = None
        self.loaded_path: Path | None = None
        # Whether the checkpoint of `step` is the file at `path`. If not, that file is damaged or
        # does not exist.
        self._newest_is_at_path = False
        self._keep = keep
        self._milestone_steps = milestone_steps
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: futures.Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and return, while a thread writes the copy to the disk.

        Waits first until the previous save is finished.

        Args:
            state: Tensors and plain Python values, among them "step" (int).

        Raises:
            OSError: The *previous* save failed, for example because the disk is full.
        """
        self.wait()
        if self.step is None:
            # A run that was not resumed supersedes the checkpoint that is already here.
            with suppress(ValueError):
                self.load()

        devices: set[torch.device] = set()
        state = _copy_to_host(state, devices)
        # Blocking events: the thread that waits for the copies sleeps instead of spinning.
        copied = [
            torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))
            for device in devices
        ]
        self._writing = self._thread.submit(self._write, state, copied)

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: The save failed, and the files from before are unchanged. Raised only once.
        """
        if self._writing is not None:
            # If this is interrupted, _writing stays set, and a later call waits again.
            futures.wait([self._writing])
            finished = self._writing
            self._writing = None
            finished.result()

    def finish(self) -> None:
        """Wait, then delete surplus checkpoints that a killed process has left."""
        self.wait()
        self._prune()

    def load(self, device: torch.device | str = "cpu") -> tuple[dict[str, Any], list[str]]:
        """Load the newest intact checkpoint. The files in the folder are not changed.

        Returns:
            The state, and a message for each newer checkpoint that is damaged.

        Raises:
            ValueError: There is no checkpoint, or none is intact.
        """
        self.wait()
        candidates = [path for _, path in self._superseded()]
        if self.path.exists() or not candidates:
            candidates.insert(0, self.path)

        problems: list[str] = []
        for path in candidates:
            try:
                state = load_checkpoint(path, device)
            except ValueError as error:
                problems.append(str(error))
                continue
            self.step = state["step"]
            self.loaded_path = path
            self._newest_is_at_path = path == self.path
            used = f"{path} (step {self.step:,}) is used instead"
            return state, [f"{problem}; {used}" for problem in problems]
        raise ValueError("; ".join([*problems, "there is nothing to resume from"]))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def _superseded(self) -> list[tuple[int, Path]]:
        """(step, path) of the numbered checkpoints, the newest first."""
        digits = "[0-9]" * 8
        paths = self.path.parent.glob(f"checkpoint-{digits}.pt")
        return sorted(((int(path.stem[-8:]), path) for path in paths), reverse=True)

    def _write(self, state: dict[str, Any], copied: Sequence[torch.cuda.Event]) -> None:
        """Save the state once its copies have arrived; runs in the thread."""
        for event in copied:
            event.synchronize()

        self._delete_invalid()
        step = state["step"]
        superseded = None
        if self._newest_is_at_path and self.step is not None and self.step != step:
            superseded = self.path.with_name(f"checkpoint-{self.step:08d}.pt")
        save_checkpoint(self.path, state, superseded)
        self.step = step
        self._newest_is_at_path = True
        self._prune()

    def _delete_invalid(self) -> None:
        """Delete the checkpoints of later steps than the one that this run was resumed from.

        They are damaged, or they belong to a continuation that was abandoned by putting an older
        checkpoint at `path`. They are deleted before anything is written, so that they are never
        mistaken for newer checkpoints than the next one.
        """
        if self.step is None:
            return
        for step, path in self._superseded():
            if step > self.step:
                path.unlink()

    def _prune(self) -> None:
        """Delete the oldest checkpoints beyond `keep`, except for milestones."""
        if not self._newest_is_at_path:
            return
        for step, path in self._superseded()[self._keep - 1 :]:
            if self._milestone_steps is None or step % self._milestone_steps:
                path.unlink()


def _copy_to_host(value: Any, devices: set[torch.device]) -> Any:
    """Copy nested containers of tensors to host memory; later changes do not affect the copy.

    Copies from GPUs are asynchronous: they are queued on the current stream, before any later work.
    Their devices are added to `devices`.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        if not value.is_cuda:
            return value.to("cpu", copy=True)
        devices.add(value.device)
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return host.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the type, and the version numbers of a state_dict
        for name, item in value.items():
            copied[name] = _copy_to_host(item, devices)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(item, devices) for item in value)
    return value


def save_checkpoint(path: Path, state: dict[str, Any], superseded: Path | None = None) -> None:
    """Write a checkpoint atomically, as a file that `torch.load` can read.

    Args:
        path: The file to write or replace.
        state: Tensors and plain Python values.
        superseded: New name for the file that is at `path` now. By default that file is deleted.

    Raises:
        OSError: Writing failed (for example, the disk is full). The file at `path` is unchanged.
    """
    with replace_atomically(path, superseded) as file:
        hashing = _HashingWriter(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # has the methods that torch uses
        except RuntimeError as error:
            # After a failed write torch tries to finish its archive, and raises that failure.
            original = error.__context__
            raise original if isinstance(original, OSError) else error from None
        file.seek(-len(_EMPTY_COMMENT), os.SEEK_END)
        file.write(_COMMENT_START + hashing.sha256.hexdigest().encode())


class _HashingWriter:
    """Passes writes on to a file, and computes their checksum.

    (Serialising to memory first would block other threads.)
    """

    def __init__(self, file: BinaryIO) -> None:
        self._write = file.write
        self.flush = file.flush
        self.sha256 = hashlib.sha256()

    def write(self, data: memoryview) -> int:
        self.sha256.update(data)
        return self._write(data)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote, and verify its checksum.

    Raises:
        ValueError: The file does not exist, is damaged, or is not a checkpoint of twinfeed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not _checksum_matches(data):
        raise ValueError(
            f"{path} is damaged or not a checkpoint of twinfeed: its checksum does not match"
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint of twinfeed: it holds more than tensors and plain values"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{path} is not a checkpoint of twinfeed: it does not contain its step")
    return state


def _checksum_matches(data: bytes) -> bool:
    comment_length = len(_COMMENT_START) + _DIGEST_LENGTH
    archive = memoryview(data)[:-comment_length]
    comment_start = data[-comment_length:-_DIGEST_LENGTH]
    digest = data[-_DIGEST_LENGTH:]
    expected = hashlib.sha256(archive)
    expected.update(_EMPTY_COMMENT)
    return comment_start == _COMMENT_START and digest == expected.hexdigest().encode()


def load_states(
    parts: Mapping[str, Any], saved: Mapping[str, Any] | None, path: Path
) -> dict[str, Any]:
    """Restore networks, optimizers and the like from a checkpoint.

    Args:
        parts: What to restore, by its key in the checkpoint; each has a `load_state_dict`.
        saved: The content of the checkpoint. With None, nothing is restored.
        path: The file it was read from, for error messages.

    Returns:
        The other entries of the checkpoint; {} if `saved` is None.

    Raises:
        ValueError: A saved state does not fit its part.
    """
    if saved is None:
        return {}
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError) as error:
        # The RuntimeError of a network has one line for each weight.
        reason = " ".join(str(error).split("\n\t")[:2]).strip()
        raise ValueError(f"{path} does not fit this configuration: {reason}") from None
    return {name: value for name, value in saved.items() if name not in parts}


def configuration_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A message for each setting that differs between two configurations."""
    return [
        f"{name}: {saved.get(name, 'nothing')} saved, {current.get(name, 'nothing')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
