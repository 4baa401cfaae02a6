"""The other packages of this program: `from .sibling_packages import experiment, model, pipeline`.

In the repository they are top-level packages; after `pip install` they are `twinfeed.model` and so
on. All files here import them through this module, so that the same code works in both places.
They are imported when they are first used.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import experiment
    import model
    import pipeline

__all__ = ["experiment", "model", "pipeline"]


def __getattr__(name: str) -> ModuleType:
    """Import a package at its first use; Python calls this for names not defined yet (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    parent = __package__.rpartition(".")[0]
    return import_module(f"{parent}.{name}" if parent else name)
