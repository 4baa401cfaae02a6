"""Numba kernels that keep working if Numba's cache on disk does not.

Used by `distort_cpu.py` and by `conversion/jpeg_check.py`, which hold the kernels themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from numba import njit


class CachedKernel:
    """A function compiled by Numba, called like the function itself.

    Numba compiles it at the first call, which takes seconds, and keeps the result on disk, beside
    the function's file or in the user's cache folder. If that result cannot be read or written,
    the kernel warns once and is compiled in memory instead.

    Args:
        function: What to compile.
        options: Options of `numba.njit`, without `cache`.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._in_memory = njit(**options)(function)
        try:
            self._kernel = njit(cache=True, **options)(function)
        except RuntimeError:  # neither cache folder is writable
            self._kernel = self._in_memory

    def __call__(self, *arguments: object) -> Any:
        kernel = self._kernel
        try:
            return kernel(*arguments)
        except Exception as error:  # a damaged cache file raises anything, a full disk OSError
            if kernel is self._in_memory:
                raise
            warnings.warn(
                f"Numba's cache cannot be used; kernels are recompiled in every run: {error!r}",
                stacklevel=2,
            )
            self._kernel = self._in_memory
        return self._in_memory(*arguments)
