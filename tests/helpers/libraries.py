"""Libraries that some tests need and that need not be installed."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest


def import_or_skip(module: str) -> Any:
    """Import a module; skip the test if that fails.

    With TWINFEED_CI set, everything has to be installed, and the test fails instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that it imports
            return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("TWINFEED_CI"):
            pytest.fail(f"{module} cannot be imported: {error}")
        pytest.skip(f"needs {module}: {error}")
