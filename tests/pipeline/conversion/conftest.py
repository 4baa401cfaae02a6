"""Fixtures of the tests of conversions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.conversion import prepare, remote
from pipeline.formats import FORMATS
from tests.helpers.conversions import Killed
from tests.helpers.sources import JpegLines


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """kill_at(k): the k-th change to a file from now on is half done, then `Killed` is raised.

    kill_at(0): no longer.
    """
    writev = os.writev
    replace = os.replace
    changes_left = 0

    def is_due() -> bool:
        nonlocal changes_left
        changes_left -= 1
        return changes_left == 0

    def killed_writev(fd: int, parts: list[bytes]) -> int:
        if is_due():
            data = b"".join(parts)
            os.write(fd, data[: len(data) // 2])
            raise Killed
        return writev(fd, parts)

    def killed_replace(*paths: Any) -> None:
        if is_due():
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "writev", killed_writev)
    monkeypatch.setattr(os, "replace", killed_replace)

    def arm(change: int) -> None:
        nonlocal changes_left
        changes_left = change

    return arm


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images in a chunk, so that there are many points at which a kill may come."""
    monkeypatch.setattr(prepare, "_CHUNK_BYTES", 8000)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where sources put their copies."""
    return tmp_path / "scratch"


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short waits after attempts that a network fails."""
    monkeypatch.setattr(remote, "_RETRY_WAITS_S", (0.01, 0.01))


@pytest.fixture
def jpeg_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simpler format in place of WebDataset."""
    monkeypatch.setitem(FORMATS, "webdataset", JpegLines())  # type: ignore[misc]


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system behind memory:// URLs, emptied afterwards."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)
