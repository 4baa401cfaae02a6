"""TODO"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from . import Progress
from .records import RecordStore, Scan

SUFFIX, SHARDED = ".tar", True


def begin(samples: int) -> bytes:
    return b""


def frame(
    at: int, key: int, name: str, label: int, height: int, width: int, image: bytes, checksum: int
) -> tuple[bytes, bytes]:
    raise NotImplementedError


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    raise NotImplementedError


def scan(file: Path) -> Scan:
    raise NotImplementedError


def files(path: Path) -> list[Path]:
    return []


def open(path: Path, progress: Progress) -> RecordStore:
    raise NotImplementedError
