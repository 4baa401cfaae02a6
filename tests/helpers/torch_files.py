"""Files in both formats of torch.save: a zip archive, and the legacy format of torch before 1.6."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

BOTH_TORCH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save_torch_file(path: Path, content: Any, zipped: bool = True) -> Path:
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def write_torch_file(path: Path, pickled: bytes, zipped: bool = True) -> Path:
    """Write a torch file with this pickle and without storages."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", b"3\n")
        return path

    file = save_torch_file(path, None, zipped=False).read_bytes()
    none = pickle.dumps(None, protocol=2)
    no_keys = pickle.dumps([], protocol=2)
    assert file.endswith(none + no_keys)
    header = file.removesuffix(none + no_keys)
    path.write_bytes(header + pickled + no_keys)
    return path
