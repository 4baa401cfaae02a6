"""Files of other projects: what a torch or safetensors file holds, read without running anything that it names.

A torch file is a pickle, a program that calls whatever it names, with tensors beside it. It is safe to read here since
the unpickler can reach nothing else: every name in the file is looked up in `_Reader.find_class`, which imports nothing
and has three kinds of answers: types of numbers; functions of ours that make tensors, arrays and dictionaries out of
bytes; and, for all other names, a new class that keeps what it is given. The program calls these alone, or what they
return. None can be changed for later readers: methods, built-in types, and classes with a `__setstate__`, which pickle
calls in place of setting attributes. `torch.load` is not asked: told to accept foreign classes, it runs TorchScript,
unpacks tar files and writes patches where a file says so. No tensor has more memory than the file has bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

# Before torch 1.6: five pickles and then the numbers. The first one is this number, at any protocol from 2 on.
_LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_KNOWN_BY_START = {
    b"<": "is a web page, not weights: the download failed, fetch it again",
    b"version https://git-lfs": "is a Git LFS pointer, not weights: fetch them with git lfs pull",
}
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
        },
        **{
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
        },
        **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
        "Untyped": torch.uint8,
    }.items()
}


def safe_load(path: Path) -> Any:
    """What a file written by `torch.save` (any version since 0.2) or safetensors holds; nothing in it is run.

    Tensors are on the CPU. An OrderedDict is a dict, numpy's numbers and arrays of numbers are themselves, any other
    object is an `Inert`. Of safetensors: its tensors by name, and "__metadata__" where it has that. ValueError where
    there is no such file, or it is damaged.
    """
    try:
        if (
            path.exists() and not path.is_file()
        ):  # a pipe would be waited for, a device read without end
            raise _Refused("is a directory, pipe or device: name a file of weights")
        with open(path, "rb") as file:
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"PK\3\4"):
                return _read_zip(file)
            if start[8:9] == b"{":
                return _read_safetensors(path)
            if _LEGACY in start:
                return _read_legacy(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # of a damaged file, the unpickler's and the containers' may be any
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged: {reason}; fetch or save it again") from None
    known = (what for sign, what in _KNOWN_BY_START.items() if start.lstrip().startswith(sign))
    raise ValueError(
        f"{path} {next(known, 'is no torch file and no safetensors file' if start else 'is empty')}"
    )


class Inert(dict[Any, Any]):
    """Stands for an object of a class that is not known here: it keeps what the file says of it, and does nothing.

    args: what it was to be made from; state: what it was to be set to; parts: what was appended; and its items.
    """

    args: tuple[Any, ...]
    state: Any
    parts: list[Any]

    def __new__(cls, *args: Any, **named: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state, self.parts = args, None, []
        return self

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __call__(self, *args: Any, **named: Any) -> Inert:
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, part: Any) -> None:
        self.parts.append(part)

    add = append
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key


class _Refused(Exception):
    """What is wrong with a file that is not damaged."""


class _Dict(dict[Any, Any]):
    """An OrderedDict without attributes, where a state_dict keeps its versions."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """What numpy says of an array's elements. (Its own dtype can be told to take their bytes for pointers.)"""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    @property
    def number(self) -> np.dtype[Any] | None:
        is_number = re.fullmatch(r"[biufc]\d+", str(self.code)) and self.order in tuple("<>|=")
        return np.dtype(self.order + self.code) if is_number else None


class _Array(np.ndarray[Any, Any]):
    """Empty, where its elements are no numbers."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, elements = state
        if dtype.number is not None:
            super().__setstate__((version, shape, dtype.number, fortran, elements))


class _Reader(pickle.Unpickler):
    """Unpickles one object. `storage` returns the bytes of a (key, number of bytes, type of its numbers)."""

    def __init__(
        self, file: BinaryIO, storage: Callable[[Any, int, torch.dtype], bytearray] | None = None
    ) -> None:
        super().__init__(file, encoding="latin1")  # of Python 2's strings, which may be bytes
        self._storage, self._stubs = storage, dict[tuple[str, str], type[Inert]]()
        self._known: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda make, kind, arguments, state: make(
                *arguments
            ),
            "collections.OrderedDict": _Dict,
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how bytes are kept
            "numpy.dtype": _Dtype,
        }
        for module in ("builtins", "__builtin__"):
            self._known |= {f"{module}.set": set, f"{module}.frozenset": frozenset}
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self._known |= {f"{module}.scalar": self._scalar}
            self._known[f"{module}._reconstruct"] = lambda *_: np.empty(0).view(_Array)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            if re.match(
                "q|bits", name
            ):  # as_strided crashes with a tensor of these that has no quantizer
                raise _Refused(
                    f"holds quantised numbers ({name}): save the weights in floating point"
                )
            return dtype
        if known := self._known.get(f"{module}.{name}"):
            return known
        if (module, name) not in self._stubs:
            self._stubs[module, name] = type(name, (Inert,), {"__module__": module})
        return self._stubs[module, name]

    def persistent_load(self, saved_id: Any) -> Any:
        if saved_id[0] == "module":  # a class, and its source, in the older format
            return saved_id[1]
        kind, dtype, key, _, count, *view = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self._storage is None:
            raise pickle.UnpicklingError("it keeps something else than numbers beside its pickle")
        # One memory for all that is called the same, whatever object says so
        data = self._storage(str(key), count * dtype.itemsize, dtype)
        # Of a buffer, even if empty: nothing in torch will make it larger.
        flat = torch.frombuffer(data or bytearray(dtype.itemsize), dtype=dtype)[
            : len(data) // dtype.itemsize
        ]
        if view and view[0] is not None:
            _, first, count = view[0]
            flat = flat[first : first + count]
        return flat

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
        if dtypes := [
            value for value in rest if isinstance(value, torch.dtype)
        ]:  # _v3, of types without a storage
            storage = storage.view(dtypes[0])
        return torch.as_strided(
            storage, size, stride, storage.storage_offset() + offset
        )  # which checks the bounds

    def _scalar(self, dtype: _Dtype, element: Any) -> Any:
        return element if dtype.number is None else np.frombuffer(element, dtype.number)[0]


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickled = min(
            (name for name in sizes if re.fullmatch("[^/]+/data.pkl", name)), default=None
        )
        if pickled is None:
            raise _Refused("is a zip archive, but no torch file: it has no data.pkl")
        root = pickled.removesuffix("data.pkl")
        if f"{root}constants.pkl" in sizes:
            raise _Refused("is a TorchScript program, not weights: save its state_dict() instead")
        if sum(sizes.values()) > file.seek(0, io.SEEK_END):
            raise _Refused(
                "claims to hold more than it does: it is damaged, or was compressed; save it by torch.save"
            )
        swap = f"{root}byteorder" in sizes and archive.read(f"{root}byteorder") == b"big"
        read: dict[str, bytearray] = {}

        def storage(key: Any, size: int, dtype: torch.dtype) -> bytearray:
            if key not in read:
                read[key] = bytearray(archive.read(f"{root}data/{key}"))
                if swap and read[key]:
                    torch.frombuffer(read[key], dtype=dtype).untyped_storage().byteswap(dtype)
            if len(read[key]) != size:
                raise pickle.UnpicklingError(
                    f"{size:,} bytes are announced where {len(read[key]):,} are"
                )
            return read[key]

        return _Reader(io.BytesIO(archive.read(pickled)), storage).load()


def _read_legacy(file: BinaryIO) -> Any:
    left, read = file.seek(0, io.SEEK_END), dict[str, tuple[bytearray, int]]()
    file.seek(0)

    def storage(key: Any, size: int, dtype: torch.dtype) -> bytearray:
        nonlocal left
        if key not in read:
            left -= size
            if size < 0 or left < 0:
                raise pickle.UnpicklingError("more numbers are announced than there are")
            read[key] = (
                bytearray(size),
                dtype.itemsize,
            )  # still zeros: the numbers come last in the file
        if len(read[key][0]) != size:
            raise pickle.UnpicklingError(f"a storage of {size:,} bytes has {len(read[key][0]):,}")
        return read[key][0]

    for _ in ("the magic number", "the version, 1001", "sizes of C's types"):
        _Reader(file).load()
    content, keys = _Reader(file, storage).load(), _Reader(file).load()
    if set(keys) != read.keys():
        raise pickle.UnpicklingError("its numbers are not those that it names")
    for data, itemsize in (read[key] for key in keys):
        (count,) = struct.unpack("<q", file.read(8))
        if count * itemsize != len(data) or file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise EOFError("it ends too early")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        about = {"__metadata__": file.metadata()} if file.metadata() else {}
        return about | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
