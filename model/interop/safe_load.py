"""Reading torch and safetensors files from unknown sources without running code from them.

A torch file contains a pickle: a program that can call any function it names. `_SafeUnpickler`
looks up every name in its own `find_class`, which imports nothing and returns only

- dtypes;
- our functions that make tensors, arrays and dictionaries from bytes;
- for any other name, a new subclass of `Inert`, which stores its arguments.

The program can call only these, and what they return. None of them can be modified for the files
that are read later: they are methods, built-in types, and classes with a `__setstate__`, which
pickle calls instead of setting attributes.

`torch.load` is not used: `weights_only=True` refuses files with unknown classes, and with an
unpickler that accepts them, torch runs TorchScript, unpacks tar files and writes patches if a file
asks for that.

No tensor gets more memory than the file has bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

# Files of torch before 1.6 are a sequence of five pickles followed by the numbers. The first pickle
# is this number; its bytes are the same at any pickle protocol from 2 on.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

_MISTAKEN_FILES = {
    b"<": "is a web page, not weights: the download failed, fetch it again",
    b"version https://git-lfs": "is a Git LFS pointer, not weights: fetch them with git lfs pull",
}

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
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
            raise _RefusedError("is a directory, pipe or device: name a file of weights")
        return _read(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except _RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # a damaged file can cause any exception in pickle, zipfile or torch
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged: {reason}; fetch or save it again") from None


class Inert(dict[Any, Any]):
    """Takes the place of an object of an unknown class: it stores its data and does nothing.

    If the object was a dictionary, its items are the items of this one.

    Attributes:
        args: The arguments of its constructor.
        state: The argument of `__setstate__`, usually its attributes.
        parts: The items that were appended if it was a list or a set.
    """

    args: tuple[Any, ...]
    state: Any
    parts: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args = args
        self.state = None
        self.parts = []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, part: Any) -> None:
        self.parts.append(part)

    add = append
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be the key of a dictionary


class _RefusedError(Exception):
    """The reason why an undamaged file is refused, as the end of a sentence about it."""


class _PlainDict(dict[Any, Any]):
    """An OrderedDict without the attributes that a state_dict adds to it."""

    def __setstate__(self, state: Any) -> None:
        pass


class _ArrayDtype:
    """The dtype of a NumPy array in a file.

    (A file can make NumPy's own dtype interpret bytes as pointers.)
    """

    def __init__(self, code: str, *flags: Any) -> None:
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]

    @property
    def numeric(self) -> np.dtype[Any] | None:
        """NumPy's dtype if the elements are numbers, else None."""
        is_number = re.fullmatch(r"[biufc]\d+", str(self.code)) is not None
        if is_number and self.byte_order in ("<", ">", "|", "="):
            return np.dtype(self.byte_order + self.code)
        return None


class _NumericArray(np.ndarray[Any, Any]):
    """A NumPy array in a file; it stays empty if its elements are not numbers."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, elements = state
        if dtype.numeric is not None:
            super().__setstate__((version, shape, dtype.numeric, is_fortran, elements))


class _StorageReader(Protocol):
    """Returns the bytes of a storage."""

    def __call__(self, key: str, size: int, dtype: torch.dtype) -> bytearray: ...


class _SafeUnpickler(pickle.Unpickler):
    """Unpickles one object without running code from the file (see the top of this module)."""

    def __init__(self, file: BinaryIO, read_storage: _StorageReader | None = None) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2 may contain any bytes
        self._read_storage = read_storage
        self._inert_classes: dict[tuple[str, str], type[Inert]] = {}
        self._known = self._known_functions()

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for; pickle calls this for each name."""
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return _safe_dtype(name)
        known = self._known.get(f"{module}.{name}")
        if known is not None:
            return known
        if (module, name) not in self._inert_classes:
            self._inert_classes[module, name] = type(name, (Inert,), {"__module__": module})
        return self._inert_classes[module, name]

    def persistent_load(self, saved_id: Any) -> Any:
        """The storage of a tensor, as a flat tensor; pickle calls this for objects beside it."""
        if saved_id[0] == "module":  # in legacy files: a class together with its source code
            return saved_id[1]
        kind, dtype, key, _, count, *view = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self._read_storage is None:
            raise pickle.UnpicklingError("it keeps other things than numbers beside its pickle")

        # Keys that are equal as text are one storage, whatever objects they are in the pickle.
        data = self._read_storage(str(key), count * dtype.itemsize, dtype)
        # Even an empty tensor is made from a buffer, so that no torch function can enlarge it.
        buffer = data or bytearray(dtype.itemsize)
        flat = torch.frombuffer(buffer, dtype=dtype)[: len(data) // dtype.itemsize]
        if view and view[0] is not None:  # in legacy files: a part of another storage
            _, first, count = view[0]
            flat = flat[first : first + count]
        return flat

    def _known_functions(self) -> dict[str, Any]:
        """Our replacements for the functions and classes that files of weights need."""
        known: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self._make_tensor,
            "torch._utils._rebuild_tensor_v2": self._make_tensor,
            "torch._utils._rebuild_tensor_v3": self._make_tensor,
            "torch._utils._rebuild_parameter": self._make_parameter,
            "torch._utils._rebuild_parameter_with_state": self._make_parameter,
            "torch._tensor._rebuild_from_type_v2": self._make_subclass,
            "collections.OrderedDict": _PlainDict,
            "_codecs.encode": self._make_bytes,
            "numpy.dtype": _ArrayDtype,
        }
        for module in ("builtins", "__builtin__"):  # Python 3 and 2
            known[f"{module}.set"] = set
            known[f"{module}.frozenset"] = frozenset
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # NumPy 1 and 2
            known[f"{module}.scalar"] = self._make_scalar
            known[f"{module}._reconstruct"] = self._make_array
        return known

    # These are methods, even without use of `self`: a file can modify functions, but not methods.

    def _make_tensor(
        self, storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any
    ) -> Tensor:
        # _rebuild_tensor_v3 also has the dtype, if it is one without a storage class.
        dtypes = [value for value in rest if isinstance(value, torch.dtype)]
        if dtypes:
            storage = storage.view(dtypes[0])
        # as_strided checks that the tensor lies within the storage.
        return torch.as_strided(storage, size, stride, storage.storage_offset() + offset)

    def _make_parameter(self, data: Any, *rest: Any) -> Any:
        return data

    def _make_subclass(self, make: Any, cls: Any, arguments: Any, state: Any) -> Any:
        """A tensor of a subclass becomes a plain tensor."""
        return make(*arguments)

    def _make_bytes(self, text: Any, encoding: Any) -> Any:
        """Python 3 pickles bytes as Latin-1 text at protocol 2."""
        return text.encode("latin1")

    def _make_scalar(self, dtype: _ArrayDtype, element: Any) -> Any:
        return element if dtype.numeric is None else np.frombuffer(element, dtype.numeric)[0]

    def _make_array(self, *rest: Any) -> _NumericArray:
        return np.empty(0).view(_NumericArray)


def _safe_dtype(name: str) -> torch.dtype:
    # as_strided crashes the process for a quantised tensor without a quantizer.
    if re.match("q|bits", name):
        raise _RefusedError(f"holds quantised numbers ({name}): save the weights in floating point")
    dtype: torch.dtype = vars(torch)[name]
    return dtype


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
        raise _RefusedError("is empty")
    for beginning, message in _MISTAKEN_FILES.items():
        if start.lstrip().startswith(beginning):
            raise _RefusedError(message)
    raise _RefusedError("is not a torch file and not a safetensors file")


def _read_zip(file: BinaryIO) -> Any:
    """A file of torch 1.6 or later: a zip archive with `data.pkl`, and each storage in `data/`."""
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickles = [name for name in sizes if re.fullmatch("[^/]+/data.pkl", name)]
        if not pickles:
            raise _RefusedError("is a zip archive, but not a torch file: it has no data.pkl")
        pickle_name = min(pickles)
        root = pickle_name.removesuffix("data.pkl")
        if f"{root}constants.pkl" in sizes:
            raise _RefusedError(
                "is a TorchScript program, not weights: save its state_dict() instead"
            )
        file_size = file.seek(0, io.SEEK_END)
        if sum(sizes.values()) > file_size:
            raise _RefusedError(
                "claims to hold more than it does: it is damaged, or was compressed; save it by "
                "torch.save"
            )
        storages = _ZipStorages(archive, root)
        return _SafeUnpickler(io.BytesIO(archive.read(pickle_name)), storages.read).load()


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
                f"{size:,} bytes are announced, but there are {len(data):,}"
            )
        return data


def _read_legacy(file: BinaryIO) -> Any:
    """A file of torch before 1.6: five pickles, and then the storages."""
    file_size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for _ in ("the magic number", "the version, 1001", "sizes of C's types"):
        _SafeUnpickler(file).load()
    storages = _LegacyStorages(file_size)
    content = _SafeUnpickler(file, storages.read).load()
    keys = _SafeUnpickler(file).load()
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
                raise pickle.UnpicklingError("more numbers are announced than the file has")
            self._data[key] = bytearray(size)
            self._item_sizes[key] = dtype.itemsize
        data = self._data[key]
        if len(data) != size:
            raise pickle.UnpicklingError(f"a storage of {size:,} bytes has {len(data):,}")
        return data

    def fill(self, file: BinaryIO, keys: Any) -> None:
        """Read the numbers of all storages, in the order of `keys`."""
        if set(keys) != self._data.keys():
            raise pickle.UnpicklingError("its numbers are not those that its tensors need")
        for key in keys:
            data = self._data[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count * self._item_sizes[key] != len(data):
                raise pickle.UnpicklingError(f"a storage of {len(data):,} bytes has another size")
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise EOFError("it ends too early")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if metadata:
        return {"__metadata__": metadata} | content
    return content
