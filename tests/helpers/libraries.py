"""Libraries that some tests need and that need not be installed."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest


def needed(module: str) -> Any:
    """That module, or a skipped test where it is missing; a failed one where everything has to be installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it thinks of the libraries that it imports
            return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("TWINFEED_CI"):
            pytest.fail(f"{module} cannot be imported: {error}")
        pytest.skip(f"needs {module}: {error}")
