"""safe_load returns the content of torch and safetensors files, and never runs code from them."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import subprocess
import sys
import timeit
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from model import safe_load
from model.interop.safe_unpickler import Inert
from tests.helpers.torch_files import BOTH_TORCH_FORMATS, save_torch_file, write_torch_file

# ── content ───────────────────────────────────────────────────────────────────────────────────────

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
]


@BOTH_TORCH_FORMATS
def test_tensors_of_all_dtypes_and_layouts_are_read(zipped: bool, tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    content = {str(dtype): torch.arange(2, 7).to(dtype) for dtype in DTYPES}
    content |= {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "transposed": base.T,
        "part": base[1:4, ::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": nn.Parameter(base),
        "last": base[5],
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    module = nn.BatchNorm1d(3).state_dict()
    path = save_torch_file(tmp_path / "x.pt", {"tensors": content, "module": module}, zipped)
    loaded = safe_load(path)
    for part, expected in (("tensors", content), ("module", module)):
        assert list(loaded[part]) == list(expected)
        for name, value in expected.items():
            ours = loaded[part][name]
            assert (ours.dtype, ours.shape, ours.stride()) == (
                value.dtype,
                value.shape,
                value.stride(),
            ), name
            assert ours.tolist() == value.tolist(), name
    shared = loaded["tensors"]
    shared["parameter"][5, 0] = 42
    assert shared["last"][0] == shared["transposed"][0, 5] == 42, (
        "they share memory, as in the file"
    )


@BOTH_TORCH_FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_and_arrays_are_read(zipped: bool, protocol: int, tmp_path: Path) -> None:
    lists = defaultdict(list, a=[1])
    content = {
        "values": [
            None,
            True,
            1,
            -(2**70),
            0.5,
            "naïve",
            b"\x00\xff",
            (1, (2,)),
            {3, 4},
            frozenset({5}),
        ],
        "ordered": OrderedDict(b=1, a=2),
        "array": np.arange(6, dtype="<i2").reshape(2, 3).T,
        "big endian": np.arange(3, dtype=">f8"),
        "float": np.float64(1.5),
        "text": np.array(["a"]),
        "objects": np.array([{}, os], dtype=object)[:1],
        "default": lists,
        "dtype": torch.bfloat16,
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    loaded = safe_load(path)
    assert loaded["values"] == content["values"]
    assert list(loaded["ordered"].items()) == [("b", 1), ("a", 2)]
    for name in ("array", "big endian"):
        np.testing.assert_array_equal(loaded[name], content[name])
        assert loaded[name].dtype.type == content[name].dtype.type
    assert loaded["float"] == 1.5
    assert loaded["default"] == {"a": [1]}
    assert loaded["dtype"] is torch.bfloat16
    assert loaded["text"].size == loaded["objects"].size == 0, "only numeric arrays are kept"


def test_safetensors_files_are_read_with_their_metadata(tmp_path: Path) -> None:
    content = {"a": torch.randn(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(content, tmp_path / "x", {"format": "pt"})
    loaded = safe_load(tmp_path / "x")
    assert loaded.pop("__metadata__") == {"format": "pt"}
    assert all(torch.equal(loaded[name], content[name]) for name in ("a", "b"))


def test_a_file_from_a_big_endian_machine_is_read(tmp_path: Path) -> None:
    content = {
        "half": torch.randn(5).half(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "n": torch.tensor(258),
    }
    path = save_torch_file(tmp_path / "x.pt", content)
    with zipfile.ZipFile(path) as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for name in little.namelist():
            data = little.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in name:
                width = {10: 2, 24: 4, 8: 8}[len(data)]
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            big.writestr(name, data)
    loaded = safe_load(tmp_path / "big.pt")
    assert all(torch.equal(loaded[name], content[name]) for name in content)


# ── objects of unknown classes ───────────────────────────────────────────────────────────────────


@pytest.fixture
def temporary_module() -> Iterator[Callable[[str, type], type]]:
    """Puts a class into a made-up module, which can be imported until `forget` is called."""
    made: list[str] = []

    def put(module: str, cls: type) -> type:
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                made.append(name)
        cls.__module__, cls.__qualname__ = module, cls.__name__
        setattr(sys.modules[module], cls.__name__, cls)
        return cls

    put.forget = lambda: [sys.modules.pop(name) for name in made]  # type: ignore[attr-defined]
    yield put
    for name in made:
        sys.modules.pop(name, None)


@BOTH_TORCH_FORMATS
def test_objects_of_unknown_classes_are_inert_and_the_weights_are_read(
    temporary_module: Any, zipped: bool, tmp_path: Path
) -> None:
    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._count_history = np.arange(3.0), np.ones(3, dtype=np.int64)
            self._statistics_methods = {"mean": min}

    class DictConfig:
        def __init__(self, content: dict[str, Any]) -> None:
            self.content = content

        def __getstate__(self) -> dict[str, Any]:
            return {"_content": self.content}

        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("code from the file was run")

    class AttributeDict(dict):
        __getattr__ = dict.__getitem__

    class ListConfig(list):
        pass

    history = temporary_module("mmengine.logging.history_buffer", HistoryBuffer)()
    config = temporary_module("omegaconf.dictconfig", DictConfig)({"lr": 0.3, "path": tmp_path})
    attributes = temporary_module("lightning_fabric.utilities.data", AttributeDict)(
        lr=0.1, widths=[1]
    )
    items = temporary_module("omegaconf.listconfig", ListConfig)([1, 2])
    content = {
        "state_dict": OrderedDict(weight=torch.arange(4.0)),
        "message_hub": {"log_scalars": {"loss": history}},
        "hyper_parameters": attributes,
        "cfg": config,
        "list": items,
        "args": argparse.Namespace(epochs=5, out=tmp_path),
        "callbacks": {AttributeDict: 1},
        "filter": nn.functional.relu,
        "module": nn.Linear(2, 3),
    }
    path = save_torch_file(tmp_path / "x.pt", content, zipped)
    temporary_module.forget()
    loaded = safe_load(path)
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(4.0))
    inert = loaded["message_hub"]["log_scalars"]["loss"]
    assert type(inert).__name__ == "HistoryBuffer"
    assert inert.state["_log_history"].tolist() == [0, 1, 2]
    assert dict(loaded["hyper_parameters"]) == {"lr": 0.1, "widths": [1]}
    assert loaded["cfg"].state["_content"]["path"].args == tmp_path.parts
    assert loaded["list"].parts == [1, 2]
    assert loaded["args"].state["epochs"] == 5
    assert isinstance(loaded["module"], Inert)
    assert issubclass(loaded["filter"], Inert)


# ── attempts to run code ─────────────────────────────────────────────────────────────────────────


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Callable, because its result may be called in turn."""


def attempts(mark: Path) -> dict[str, bytes]:
    """Pickles that create the file `mark` if any code in them is run."""
    touch, text = f"touch {mark}", f"__import__('pathlib').Path({str(mark)!r}).touch()"
    call = {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, text),
        "exec": Calls(exec, text),
        "open": Calls(open, str(mark), "w"),
        "subprocess": Calls(subprocess.check_call, touch.split()),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), touch),
        "partial": Calls(functools.partial(os.system, touch)),
        "map in a set": Calls(set, Calls(map, os.system, [touch])),
        "reduce": Calls(functools.reduce, os.system, [touch]),
        "in an OrderedDict": OrderedDict(a=OrderedDict(b=Calls(os.system, touch))),
        "default factory": Calls(defaultdict, functools.partial(os.system, touch)),
        "torch.load": Calls(torch.load, str(mark)),
        "torch.save": Calls(torch.save, {}, str(mark)),
        "numpy": Calls(np.savetxt, str(mark), [1]),
        "device": Calls(
            torch._utils._rebuild_device_tensor_from_numpy,
            Calls(np.savetxt, str(mark), [1]),
            1,
            "cpu",
            0,
        ),
        "subclass": Calls(torch._tensor._rebuild_from_type_v2, os.system, int, (touch,), {}),
        "hooks": Calls(
            torch._utils._rebuild_parameter, Calls(os.system, touch), False, OrderedDict()
        ),
        "codec": Calls(__import__("_codecs").encode, "x", f"../{mark.name}"),
        "timeit": Calls(timeit.timeit, text, "pass", timeit.default_timer, 1),
        "jit": Calls(torch.jit.CompilationUnit, f"def f():\n  torch.save(0, '{mark}')"),
    }
    programs = {
        f"{name} {p}": pickle.dumps(what, protocol=p)
        for p in (0, 2, 4)
        for name, what in call.items()
    }
    name = str(mark).encode()
    line = b"S'touch " + name + b"'\n"
    programs |= {
        "INST": b"(" + line + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + line + b"o.",
        "GLOBAL": b"cposix\nsystem\n(" + line + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + line + b"tR.",
        "dotted": b"\x80\x04\x8c\x0dmodel.layouts\x8c\x10io.open.__call__\x93(S'"
        + name
        + b"'\nS'w'\ntR.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(]" + b"(S'touch'\nS'" + name + b"'\net\x81.",
        "EXT": b"\x80\x02\x82\x01" + b"(" + line + b"tR.",
        "__setstate__": b"\x80\x02cos\nsystem\n" + line + b"b.",
        "instance": b"\x80\x02ccodeop\nCompile\n)\x81(" + line + b"tR.",
        "persistent": b"\x80\x02(S'module'\ncos\nsystem\nS'a'\nS'b'\ntQ.",
        "persistent id of text": b"Pwhatever\n.",
        "patch": (
            b"\x80\x02(S'module'\ncmine\nModule\n)\x81}(S'__wrapped__'\nccollections\nOrderedDict\nS'dump_patches'\nI01\n"
            b"S'__name__'\nS'" + name + b"'\nubS'a'\nS'b'\ntQ."
        ),
    }
    return programs


@BOTH_TORCH_FORMATS
def test_no_code_from_a_file_is_run(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark, read = tmp_path / "mark", 0
    for name, program in attempts(mark).items():
        path = write_torch_file(tmp_path / "x.pt", program, zipped)
        try:
            safe_load(path)
            read += 1
        except ValueError as error:
            assert str(path) in str(error), name  # noqa: PT017
            assert "\n" not in str(error), name  # noqa: PT017
        assert not mark.exists(), name
        assert not list(tmp_path.glob("*.patch")), name
        path.unlink()
    assert read > 50, "most files are read, with inert objects"


@pytest.mark.parametrize(
    "name", ["os.system 2", "eval 4", "timeit 2", "getattr 4", "GLOBAL", "INST", "OBJ"]
)
def test_the_attempts_run_code_with_plain_pickle(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(attempts(mark)[name])
    assert mark.exists()


def test_a_file_cannot_modify_how_the_next_one_is_read(tmp_path: Path) -> None:
    """BUILD sets attributes of any object, also of functions and classes that were looked up."""
    good = save_torch_file(
        tmp_path / "good.pt", {"a": torch.arange(3.0), "b": OrderedDict(c={1}), "n": np.arange(3)}
    )
    before = safe_load(good)
    names = [
        *(
            "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_parameter",
            "torch._tensor _rebuild_from_type_v2",
        ),
        *(
            "collections OrderedDict",
            "numpy dtype",
            "numpy.core.multiarray _reconstruct",
            "builtins set",
        ),
        *(
            "torch float32",
            "torch FloatStorage",
            "torch Tensor",
            "torch.nn Parameter",
            "any Thing",
            "_codecs encode",
        ),
        *("numpy ndarray", "numpy.core.multiarray scalar"),
    ]
    values = [b"(cany\nThing\n)R", b"N", b")", b"I1\n"]
    for name in names:
        found = b"c" + name.replace(" ", "\n").encode() + b"\n"
        for attribute in (
            b"__new__",
            b"__init__",
            b"__defaults__",
            b"__code__",
            b"__setstate__",
            b"__call__",
            b"dtype",
        ):
            for value in values[:2]:
                state = b"(N}S'" + attribute + b"'\n" + value.replace(b"(c", b"c") + b"st"
                for program in (found + state + b"b.", found + b")R" + state + b"b."):
                    with suppress(ValueError):
                        safe_load(write_torch_file(tmp_path / "x.pt", b"\x80\x02" + program))
    after = safe_load(good)
    assert torch.equal(after["a"], before["a"])
    assert (after["b"], after["n"].tolist()) == ({"c": {1}}, [0, 1, 2])
    assert torch.equal(torch.load(good, weights_only=False)["a"], before["a"])
