"""Weights in the file formats of other projects: reading, writing, and training on from them.

A *layout* is the way in which a project names the entries of its files. layouts.py has a table of
all layouts. Files are read in three steps: safe_load.py turns a file into tensors and plain values
without running code from it, reading.py finds the layout and renames the entries, and weights.py
checks that the result is a whole network. exporting.py writes files, and continuation.py starts a
pretraining run from one.
"""

from .continuation import continue_from
from .exporting import EXPORTS, export, export_backbone
from .layouts import LAYOUTS
from .reading import read_weights
from .safe_load import safe_load
from .weights import Weights, load_backbone

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
