"""Imports of packages that only `uv sync --extra convert` installs."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{package} is missing: uv sync --extra convert") from error
