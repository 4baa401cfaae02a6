"""Torch and safetensors files of other projects that are damaged, or claim more than they hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from model import safe_load
from tests.helpers.torch_files import TORCH_FORMATS, saved, with_pickle


def unreadable(path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        safe_load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert not [word for word in words if word not in said], said


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    unreadable(tmp_path / "absent.pt", "No such file")
    unreadable(tmp_path, "directory")
    for content, words in {
        b"": ["empty"],
        b"\n<!DOCTYPE html><html>404": ["web page", "download"],
        b"version https://git-lfs.github.com/spec/v1\n": ["git lfs pull"],
        b"\xff\xd8\xff\xe0 a photograph": ["not a torch file"],
        pickle.dumps({"a": 1}): ["not a torch file"],
    }.items():
        (tmp_path / "x.pt").write_bytes(content)
        unreadable(tmp_path / "x.pt", *words)
    with zipfile.ZipFile(tmp_path / "x.docx", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    unreadable(tmp_path / "x.docx", "zip archive", "data.pkl")
    with zipfile.ZipFile(tmp_path / "x.ts", "w") as archive:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{member}", pickle.dumps(1))
    unreadable(tmp_path / "x.ts", "TorchScript", "state_dict")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_is_refused_wherever_that_was(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "x", {"a": torch.randn(100), "b": torch.randn(30)}
    if kind == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        saved(path, content, kind == "zip")
    data = path.read_bytes()
    for length in [*range(16, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:length])
        unreadable(path)


@TORCH_FORMATS
def test_bits_that_turned_are_refused_or_read(zipped: bool, tmp_path: Path) -> None:
    path = saved(
        tmp_path / "x", {"a": torch.randn(10), "b": nn.Linear(2, 2), "c": np.arange(5)}, zipped
    )
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        turned = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            turned[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(turned)
        try:
            safe_load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def storage_program(
    count: int, size: int, stride: int = 1, offset: int = 0, view: bytes = b""
) -> bytes:
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cuda:7'\nI%d\n%stQ" % (count, view)
    tail = b"I%d\n(I%d\nt(I%d\ntI00\nccollections\nOrderedDict\n)RtR." % (offset, size, stride)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + tail


@pytest.mark.parametrize(
    "program",
    [
        storage_program(2**50, 4),
        storage_program(-1, 1),
        storage_program(4, 2**50),
        storage_program(4, 5),
        storage_program(4, 2, stride=4),
        storage_program(4, 2, stride=-1, offset=1),
        storage_program(4, 1, offset=4),
        storage_program(4, 1, offset=-1),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N"
        + storage_program(4, 4).partition(b"tQ")[2],
    ],
)
def test_a_tensor_cannot_be_larger_than_its_storage_nor_that_than_the_file(
    program: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    for numbers in (storage_program(4, 4), program):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", numbers)
            archive.writestr("archive/data/0", np.arange(4, dtype="f4").tobytes())
        if numbers is program:
            unreadable(path)
        else:
            assert safe_load(path).tolist() == [0, 1, 2, 3]
    with_pickle(path, program.replace(b"tQ", b"NtQ"), zipped=False)
    unreadable(path)


@pytest.mark.parametrize("name", ["quint8", "qint8", "qint32", "quint4x2", "bits8"])
def test_quantised_numbers_are_refused(name: str, tmp_path: Path) -> None:
    """To torch.as_strided, a tensor of these without a quantizer is a segmentation fault."""
    program = storage_program(4, 4).replace(b"FloatStorage", name.encode())
    for zipped in (True, False):
        unreadable(with_pickle(tmp_path / "x.pt", program, zipped), "quantised", name)


def test_memory_is_not_made_larger_nor_read_twice(tmp_path: Path) -> None:
    """By BUILD, which calls Tensor.__setstate__ and so Tensor.set_; by keys that differ, though called the same."""
    made = storage_program(0, 0).removeprefix(b"\x80\x02").removesuffix(b".")
    larger = b"\x80\x02" + made + b"(" + made + b"I0\n(I1048576\nt(I1\nttb."
    storage = b"(S'storage'\nctorch\nFloatStorage\nca\nb\n)RS'cpu'\nI4\ntQ"
    for name, program, data in (
        ("0", larger, b""),
        ("{}", b"\x80\x02(" + storage + storage + b"t.", bytes(16)),
    ):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr(f"archive/data/{name}", data)
        if not data:
            unreadable(tmp_path / "x.pt", "resize")
        else:
            a, b = safe_load(tmp_path / "x.pt")
            assert a.data_ptr() == b.data_ptr()


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", storage_program(2**22, 4))
        archive.writestr("archive/data/0", bytes(2**24))
    unreadable(tmp_path / "x.pt", "more than it does")
