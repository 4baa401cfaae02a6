"""Reading torch and safetensors files from unknown sources without running code from them.

This module reads the containers: zip archives, the legacy format of torch before 1.6, and
safetensors. safe_unpickler.py reads the pickle in a torch file, and explains why that is safe.

No tensor gets more memory than the file has bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from .safe_unpickler import RefusedError, SafeUnpickler

# Files of torch before 1.6 are a sequence of five pickles followed by the numbers. The first pickle
# is this number; its bytes are the same at any pickle protocol from 2 on.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

_MISTAKEN_FILES = {
    b"<": "is a web page, not weights: the download failed, fetch it again",
    b"version https://git-lfs": "is a Git LFS pointer, not weights: fetch them with git lfs pull",
}


def safe_load(path: Path) -> Any:
    """Read a file of `torch.save` (any version since 0.2) or safetensors without running its code.

    Returns:
        The content of a torch file with tensors on the CPU. OrderedDicts are dicts, NumPy's numbers
        and numeric arrays are kept, and any other object is an `Inert`. For safetensors: its
        tensors by name, and "__metadata__" if it has metadata.

    Raises:
        ValueError: The file does not exist, is damaged, or is not of these formats. The message is
            one line.
    """
    try:
        # Opening a pipe would block, and reading a device may never end.
        if path.exists() and not path.is_file():
            raise RefusedError("is a directory, pipe or device: name a file of weights")
        return _read(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # a damaged file can cause any exception in pickle, zipfile or torch
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged: {reason}; fetch or save it again") from None


def _read(path: Path) -> Any:
    """Recognise the format of a file by its first bytes, and read it."""
    with open(path, "rb") as file:
        start = file.read(64)
        file.seek(0)
        if start.startswith(b"PK\3\4"):
            return _read_zip(file)
        if start[8:9] == b"{":
            return _read_safetensors(path)
        if _LEGACY_MAGIC in start:
            return _read_legacy(file)

    if not start:
        raise RefusedError("is empty")
    for beginning, message in _MISTAKEN_FILES.items():
        if start.lstrip().startswith(beginning):
            raise RefusedError(message)
    raise RefusedError("is not a torch file and not a safetensors file")


def _read_zip(file: BinaryIO) -> Any:
    """A file of torch 1.6 or later: a zip archive with `data.pkl`, and each storage in `data/`."""
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickles = [name for name in sizes if re.fullmatch("[^/]+/data.pkl", name)]
        if not pickles:
            raise RefusedError("is a zip archive, but not a torch file: it has no data.pkl")
        pickle_name = min(pickles)
        root = pickle_name.removesuffix("data.pkl")
        if f"{root}constants.pkl" in sizes:
            raise RefusedError(
                "is a TorchScript program, not weights: save its state_dict() instead"
            )
        file_size = file.seek(0, io.SEEK_END)
        if sum(sizes.values()) > file_size:
            raise RefusedError(
                "has contents that are larger than the file: it is damaged or compressed; save it "
                "again with torch.save"
            )
        storages = _ZipStorages(archive, root)
        return SafeUnpickler(io.BytesIO(archive.read(pickle_name)), storages.read).load()


class _ZipStorages:
    """The storages in a zip archive; each is read once, when it is first used."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive = archive
        self._root = root
        byte_order = f"{root}byteorder"
        names = archive.namelist()
        self._is_big_endian = byte_order in names and archive.read(byte_order) == b"big"
        self._data: dict[str, bytearray] = {}

    def read(self, key: str, size: int, dtype: torch.dtype) -> bytearray:
        if key not in self._data:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            if self._is_big_endian and data:
                torch.frombuffer(data, dtype=dtype).untyped_storage().byteswap(dtype)
            self._data[key] = data
        data = self._data[key]
        if len(data) != size:
            raise pickle.UnpicklingError(
                f"the header says that a storage has {size:,} bytes, the file has {len(data):,}"
            )
        return data


def _read_legacy(file: BinaryIO) -> Any:
    """A file of torch before 1.6: five pickles, and then the storages."""
    file_size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for _ in ("the magic number", "the version, 1001", "sizes of C's types"):
        SafeUnpickler(file).load()
    storages = _LegacyStorages(file_size)
    content = SafeUnpickler(file, storages.read).load()
    keys = SafeUnpickler(file).load()
    storages.fill(file, keys)
    return content


class _LegacyStorages:
    """The storages of a legacy file. They are zeros until `fill`, since the numbers come last."""

    def __init__(self, file_size: int) -> None:
        self._bytes_left = file_size
        self._data: dict[str, bytearray] = {}
        self._item_sizes: dict[str, int] = {}

    def read(self, key: str, size: int, dtype: torch.dtype) -> bytearray:
        if key not in self._data:
            self._bytes_left -= size
            if size < 0 or self._bytes_left < 0:
                raise pickle.UnpicklingError(
                    "the header says that its storages have more bytes than the file"
                )
            self._data[key] = bytearray(size)
            self._item_sizes[key] = dtype.itemsize
        data = self._data[key]
        if len(data) != size:
            raise pickle.UnpicklingError(
                f"the header says that a storage has {size:,} bytes, the file has {len(data):,}"
            )
        return data

    def fill(self, file: BinaryIO, keys: Any) -> None:
        """Read the numbers of all storages, in the order of `keys`."""
        if set(keys) != self._data.keys():
            raise pickle.UnpicklingError("its storages do not match its tensors")
        for key in keys:
            data = self._data[key]
            (count,) = struct.unpack("<q", file.read(8))
            size = count * self._item_sizes[key]
            if size != len(data):
                raise pickle.UnpicklingError(
                    f"the header says that a storage has {len(data):,} bytes, the file has {size:,}"
                )
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise EOFError("it ends too early")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if metadata:
        return {"__metadata__": metadata} | content
    return content
