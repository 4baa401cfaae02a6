"""The folder in which indexes and the demo data are cached, and lists of names in its files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def cache_folder() -> Path:
    """The folder that is kept between runs; the variable TWINFEED_CACHE overrides it."""
    if folder := os.environ.get("TWINFEED_CACHE"):
        return Path(folder)
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "twinfeed"


def join_names(names: Iterable[str]) -> NDArray[np.uint8]:
    """Names as an array that can be saved without pickling.

    File names may hold bytes that are not valid text; they survive.
    """
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def split_names(joined: NDArray[np.uint8]) -> list[str]:
    """The names that `join_names` joined."""
    if len(joined) == 0:
        return []
    return [os.fsdecode(name) for name in joined.tobytes().split(b"\0")]
