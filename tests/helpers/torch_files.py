"""Files that torch.save writes, in both of its formats."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

TORCH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, program: bytes, zipped: bool = True) -> Path:
    """A torch file whose pickle is this one."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", b"3\n")
        return path
    head = saved(path, None, zipped=False).read_bytes()
    none, no_keys = pickle.dumps(None, protocol=2), pickle.dumps([], protocol=2)
    assert head.endswith(none + no_keys)
    path.write_bytes(head[: -len(none + no_keys)] + program + no_keys)
    return path
