"""Where encoded images come from: every source of images is a `Store`.

Read `store.py` first, for the protocol. `folder.py` is the store that most people use; `memory.py`
holds images that are already at hand, and `subset.py` makes parts of other stores. `voc.py` opens
PASCAL VOC 2007, `demo.py` and `demo_devkit.py` draw the data of the demo. Record files are stores
too: see `pipeline.formats`.
"""

from .cache_paths import cache_folder, join_names, split_names
from .demo import demo_folder
from .demo_devkit import demo_devkit
from .folder import FolderStore
from .image_files import find_splits
from .memory import MemoryStore
from .store import Progress, Store, class_names, fingerprint, no_progress
from .subset import (
    Subset,
    check_labels,
    first_names,
    hold_out,
    random_subset,
    shuffled,
    stratified_subset,
    subset_from_list,
    with_classes,
)
from .voc import open_voc

__all__ = [
    "FolderStore",
    "MemoryStore",
    "Progress",
    "Store",
    "Subset",
    "cache_folder",
    "check_labels",
    "class_names",
    "demo_devkit",
    "demo_folder",
    "find_splits",
    "fingerprint",
    "first_names",
    "hold_out",
    "join_names",
    "no_progress",
    "open_voc",
    "random_subset",
    "shuffled",
    "split_names",
    "stratified_subset",
    "subset_from_list",
    "with_classes",
]
