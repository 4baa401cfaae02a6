"""An unpickler that runs no code from the file.

A torch file contains a pickle: a program that can call any function it names. `SafeUnpickler`
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
"""

from __future__ import annotations

import pickle
import re
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

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


class RefusedError(Exception):
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


class StorageReader(Protocol):
    """Returns the bytes of a storage."""

    def __call__(self, key: str, size: int, dtype: torch.dtype) -> bytearray: ...


class SafeUnpickler(pickle.Unpickler):
    """Unpickles one object without running code from the file (see the top of this module)."""

    def __init__(self, file: BinaryIO, read_storage: StorageReader | None = None) -> None:
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
            raise pickle.UnpicklingError("it has a storage that is not a plain tensor storage")

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
        raise RefusedError(f"holds quantised numbers ({name}): save the weights in floating point")
    dtype: torch.dtype = vars(torch)[name]
    return dtype
