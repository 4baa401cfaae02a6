"""The folder of a conversion that is not finished, from which the same command resumes.

<target>.partial/
    lock        held by the process that converts
    plan.json   the plan that it follows
    spool/      the staging file of a source that can be read only once (see `staging.py`)
    journal/    of each shard: its unfinished file, its journal, and the reasons of its rejects
    data/       finished files
    index.npz   the index, until it is moved into place
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from ..atomic_write import atomic_write
from .plan import Plan, describe_differences


class ShardFiles(NamedTuple):
    """The files of one shard."""

    finished: Path
    unfinished: Path
    journal: Path
    rejects: Path  # a line of JSON for each image that is left out


@dataclass(frozen=True)
class WorkFolder:
    """Where everything lies in `<target>.partial`."""

    path: Path

    @property
    def staging(self) -> Path:
        return self.path / "spool"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def index(self) -> Path:
        return self.path / "index.npz"

    @property
    def _plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    @property
    def _journals(self) -> Path:
        return self.path / "journal"

    def shard_files(self, name: str) -> ShardFiles:
        return ShardFiles(
            finished=self.data / name,
            unfinished=self._journals / f"{name}.growing",
            journal=self._journals / f"{name}.rows",
            rejects=self._journals / f"{name}.rejects.jsonl",
        )

    def has_plan(self) -> bool:
        return self._plan.exists()

    def follow(self, plan: Plan) -> None:
        """Prepare the folder for a plan.

        Raises:
            ValueError: It holds a conversion with another plan, or its plan is damaged.
        """
        if self.has_plan():
            try:
                recorded = json.loads(self._plan.read_text())
                if not isinstance(recorded, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise ValueError(
                    f"{self._plan} is damaged ({error}): delete {self.path}, and start again"
                ) from error
            differences = describe_differences(recorded, plan)
            if differences:
                raise ValueError(
                    f"{self.path} holds an unfinished conversion of another source or with other "
                    f"options ({differences}): run the earlier command to finish it, or delete it"
                )
        self.data.mkdir(exist_ok=True)
        self._journals.mkdir(exist_ok=True)
        with atomic_write(self._plan) as file:
            file.write(json.dumps(asdict(plan)).encode())

    def remove(self) -> None:
        shutil.rmtree(self.path)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes out during the block; at its end, remove the folder if it is empty.

        Raises:
            ValueError: Another process is converting in this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._is_current(lock):
                    raise BlockingIOError
            except BlockingIOError:
                raise ValueError(
                    f"another conversion is writing {self.path}: wait for it, "
                    f"or choose another target"
                ) from None
            try:
                yield
            except OSError as error:
                error.add_note("once that is fixed, run the same command to continue")
                raise
            finally:
                if self._is_current(lock) and not self._holds_files():
                    shutil.rmtree(self.path, ignore_errors=True)

    def _is_current(self, lock: TextIOWrapper) -> bool:
        """Whether the lock file has not been removed or replaced by another process.

        A conversion that ends removes its folder, and the next one makes another lock file.
        """
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock))
        return False

    def _holds_files(self) -> bool:
        return any(path.is_file() and path != self._lock for path in self.path.rglob("*"))
