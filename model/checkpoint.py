"""Checkpoints that are written whole or not at all, while training goes on; checked when read, never run code."""

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

from .files import replace_atomically

# torch files are zip archives. The digest of one is its comment, whose length stands before it: in a fresh file, 0.
_NO_COMMENT, _MARK = b"\0\0", (7 + 64).to_bytes(2, "little") + b"sha256:"


class Checkpoints:
    """The checkpoints of one run: `folder`/checkpoint.pt is the newest, checkpoint-00000123.pt one that it superseded.

    The last `keep` of them stay, the newest included, and each whose step is a multiple of `milestone_steps`. Killed at
    any moment, it leaves the one before or the new one to be loaded. Use it as a context manager: it has a thread.
    """

    def __init__(self, folder: Path, keep: int = 3, milestone_steps: int | None = None) -> None:
        assert keep > 0
        self.path = folder / "checkpoint.pt"
        self.step: int | None = (
            None  # of the newest whole one, once something was loaded or is on the disk
        )
        self._at_path = False  # whether that is the one at `path`; otherwise what lies there is damaged, if anything
        self._keep, self._milestone_steps = keep, milestone_steps
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: futures.Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Take a copy of `state`, which has its "step" (int), and return while a thread writes it.

        Waits first until the save before is on the disk. OSError of a full disk: of that one, not of this.
        """
        self.wait()
        if (
            self.step is None
        ):  # what a run that was not resumed finds here must be superseded as well
            with suppress(ValueError):
                self.load()
        devices: set[torch.device] = set()
        state = _in_host_memory(state, devices)
        # Blocking: the thread that waits for the copies sleeps, it does not spin.
        copied = [
            torch.cuda.current_stream(d).record_event(torch.cuda.Event(blocking=True))
            for d in devices
        ]
        self._writing = self._thread.submit(self._write, state, copied)

    def wait(self) -> None:
        """Until everything is on the disk. OSError where that failed, once: what was there before is unchanged."""
        if self._writing is not None:
            futures.wait([self._writing])  # interrupted here, it is still to be waited for
            done, self._writing = self._writing, None
            done.result()

    def finish(self) -> None:
        """The same, and remove what a run that was killed behind its last save has left beyond `keep`."""
        self.wait()
        self._prune()

    def load(self, device: torch.device | str = "cpu") -> tuple[dict[str, Any], list[str]]:
        """The newest whole checkpoint, and a line for each damaged one before which it is preferred.

        Changes nothing in the folder. ValueError where there is no checkpoint, or none that is whole.
        """
        self.wait()
        numbered = [path for _, path in self._numbered()]
        problems = []
        for path in [self.path, *numbered] if self.path.exists() or not numbered else numbered:
            try:
                state = load_checkpoint(path, device)
            except ValueError as error:
                problems.append(str(error))
            else:
                self.step, self._at_path = state["step"], path == self.path
                return state, [
                    f"{problem}; {path} (step {self.step:,}) is used instead"
                    for problem in problems
                ]
        raise ValueError("; ".join([*problems, "there is nothing to resume from"]))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def _name(self, step: int) -> Path:
        return self.path.with_name(f"checkpoint-{step:08d}.pt")

    def _numbered(self) -> list[tuple[int, Path]]:
        """(step, path) of those that were superseded, the newest first."""
        paths = self.path.parent.glob(f"checkpoint-{'[0-9]' * 8}.pt")
        return sorted(((int(path.stem[-8:]), path) for path in paths), reverse=True)

    def _write(self, state: dict[str, Any], copied: Sequence[torch.cuda.Event]) -> None:
        for event in copied:
            event.synchronize()
        step = state["step"]
        # Those beyond the step that this run went on from are damaged, or of a future that was given up by putting an
        # older one at `path`. Gone before anything else is done, they are never taken for newer than what comes now.
        for number, path in self._numbered():
            if self.step is not None and number > self.step:
                path.unlink()
        superseded = (
            self._name(self.step) if self._at_path and self.step not in (None, step) else None
        )
        save_checkpoint(self.path, state, superseded)
        self.step, self._at_path = step, True
        self._prune()

    def _prune(self) -> None:
        for number, path in self._numbered()[self._keep - 1 :] if self._at_path else ():
            if self._milestone_steps is None or number % self._milestone_steps:
                path.unlink()


def _in_host_memory(value: Any, devices: set[torch.device]) -> Any:
    """A copy that no later change of the tensors reaches. Those on the GPUs (added to `devices`) arrive by the current
    stream, before what is queued there next, and are there only once that has come so far."""
    if isinstance(value, Tensor):
        value = value.detach()
        if not value.is_cuda:
            return value.to("cpu", copy=True)
        devices.add(value.device)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(
            value, non_blocking=True
        )
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same type: with the versions that a state_dict carries
        copied.update((name, _in_host_memory(part, devices)) for name, part in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_in_host_memory(part, devices) for part in value)
    return value


def save_checkpoint(path: Path, state: dict[str, Any], superseded: Path | None = None) -> None:
    """Write `state` (tensors and plain Python values) to `path`, replacing it only once everything is on the disk.

    The file stays one that `torch.load` reads. What was at `path` is then at `superseded`, where that is given. OSError
    (a full disk) leaves what was at `path` as it was.
    """
    with replace_atomically(path, superseded) as file:
        archive = _Archive(file)
        try:
            torch.save(state, archive)  # type: ignore[arg-type]  # not a whole file, but what of one is used
        except RuntimeError as error:  # torch ends its archive even so, and says how that failed
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_MARK + archive.sha256.hexdigest().encode())


class _Archive:
    """What torch.save writes to: a file, and the digest of it. (Made in memory first, it would stall other threads.)"""

    def __init__(self, file: BinaryIO) -> None:
        self._write, self.flush, self.sha256 = file.write, file.flush, hashlib.sha256()

    def write(self, data: memoryview) -> int:
        self.sha256.update(data)
        return self._write(data)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state saved at `path`. ValueError where the file is absent, damaged, or not a checkpoint of ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    archive, mark, digest = (
        memoryview(data)[: -len(_MARK) - 64],
        data[-len(_MARK) - 64 : -64],
        data[-64:],
    )
    actual = hashlib.sha256(archive)
    actual.update(_NO_COMMENT)
    if mark != _MARK or actual.hexdigest().encode() != digest:
        raise ValueError(
            f"{path} is damaged or no checkpoint of twinfeed: its checksum does not hold"
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no checkpoint of twinfeed: it holds more than tensors and plain values"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(
            f"{path} is no checkpoint of twinfeed: it does not say of which step it is"
        )
    return state


def load_states(
    parts: Mapping[str, Any], saved: Mapping[str, Any] | None, path: Path
) -> dict[str, Any]:
    """Give each part (a network, an optimizer) its state again; returns the rest of what was saved, {} for nothing.

    ValueError where one at `path` does not fit.
    """
    if saved is None:
        return {}
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:  # a RuntimeError has one line for each weight
        reason = " ".join(str(error).split("\n\t")[:2]).strip()
        raise ValueError(f"{path} does not fit this configuration: {reason}") from None
    return {name: value for name, value in saved.items() if name not in parts}


def configuration_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each setting that differs between two configurations."""
    return [
        f"{name}: {saved.get(name, 'nothing')} saved, {current.get(name, 'nothing')} now"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
