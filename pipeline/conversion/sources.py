"""Opens what `convert.py` reads: encoded images with labels, wherever they are.

`source_types.py` has the protocol that all sources follow. What can be read only once, or only over
a network, is copied to a staging file first (`staging.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

from ..stores import Progress
from .local import open_local
from .remote import open_remote
from .source_types import Source
from .torchvision_datasets import open_torchvision

_URL_OR_PATTERN = re.compile(r"://|\*|\{\d+\.\.\d+\}")


def open_source(spec: str | Path, progress: Progress, scratch: Path) -> Source:
    """The images that `spec` names.

    Args:
        spec: A folder of images, a data set in one of FORMATS, a folder or file of parquet, a URL
            of any of these, or `torchvision:NAME[:SPLIT]`. Paths and URLs may hold `*` and
            `{000..012}`.
        progress: Called with (done, total) while it is indexed or copied.
        scratch: Folder for copies; a complete copy that is there is used again.

    Raises:
        ValueError: There is nothing to read, or a package is missing.
        OSError: A disk or network fails.
    """
    text = str(spec)
    path = Path(spec)
    scratch.mkdir(parents=True, exist_ok=True)
    if text.startswith("torchvision:"):
        return open_torchvision(text, progress, scratch)
    if _URL_OR_PATTERN.search(text) and not path.exists():
        return open_remote(text, progress, scratch)
    return open_local(path, progress, scratch)
