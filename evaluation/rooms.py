"""The other rooms, imported when they are first asked for: `from .rooms import experiment, model, pipeline`.

In the repository the rooms are top-level packages; installed by `pip install`, they are `twinfeed.model` and so on.
Every other file of this room finds them here, so that one copy of the code serves both.
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
    """Python calls this for a name that the module does not have yet (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    parent = __package__.rpartition(".")[0]
    return import_module(f"{parent}.{name}" if parent else name)
