"""Weights in the layouts of other projects: read safely, written, and continued from."""

from .continuation import continue_from
from .layouts import EXPORTS, LAYOUTS, Weights, export, export_backbone, load_backbone, read_weights
from .safe_load import safe_load

__all__ = [
    "EXPORTS",
    "LAYOUTS",
    "Weights",
    "continue_from",
    "export",
    "export_backbone",
    "load_backbone",
    "read_weights",
    "safe_load",
]
