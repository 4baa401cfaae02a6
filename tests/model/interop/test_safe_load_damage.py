"""Torch and safetensors files that are damaged, or claim more than they hold."""

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
from tests.helpers.torch_files import BOTH_TORCH_FORMATS, save_torch_file, write_torch_file


def check_refused(path: Path, *words: str) -> None:
    """With one line that has the path and these words."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        safe_load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_files_of_other_kinds_are_refused_with_the_reason(tmp_path: Path) -> None:
    check_refused(tmp_path / "absent.pt", "No such file")
    check_refused(tmp_path, "directory")
    for content, words in {
        b"": ["empty"],
        b"\n<!DOCTYPE html><html>404": ["web page", "download"],
        b"version https://git-lfs.github.com/spec/v1\n": ["git lfs pull"],
        b"\xff\xd8\xff\xe0 a photograph": ["not a torch file"],
        pickle.dumps({"a": 1}): ["not a torch file"],
    }.items():
        (tmp_path / "x.pt").write_bytes(content)
        check_refused(tmp_path / "x.pt", *words)
    with zipfile.ZipFile(tmp_path / "x.docx", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    check_refused(tmp_path / "x.docx", "zip archive", "data.pkl")
    with zipfile.ZipFile(tmp_path / "x.ts", "w") as archive:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{member}", pickle.dumps(1))
    check_refused(tmp_path / "x.ts", "TorchScript", "state_dict")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused_at_any_length(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "x", {"a": torch.randn(100), "b": torch.randn(30)}
    if kind == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        save_torch_file(path, content, kind == "zip")
    data = path.read_bytes()
    for length in [*range(16, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:length])
        check_refused(path)


@BOTH_TORCH_FORMATS
def test_flipped_bits_never_cause_another_error_than_a_refusal(
    zipped: bool, tmp_path: Path
) -> None:
    path = save_torch_file(
        tmp_path / "x", {"a": torch.randn(10), "b": nn.Linear(2, 2), "c": np.arange(5)}, zipped
    )
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        flipped = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            safe_load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def storage_program(
    count: int, size: int, stride: int = 1, offset: int = 0, view: bytes = b""
) -> bytes:
    """A pickle of a tensor of `size` numbers in a storage of `count`."""
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
def test_a_tensor_or_storage_larger_than_the_file_is_refused(
    program: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    for numbers in (storage_program(4, 4), program):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", numbers)
            archive.writestr("archive/data/0", np.arange(4, dtype="f4").tobytes())
        if numbers is program:
            check_refused(path)
        else:
            assert safe_load(path).tolist() == [0, 1, 2, 3]
    write_torch_file(path, program.replace(b"tQ", b"NtQ"), zipped=False)
    check_refused(path)


@pytest.mark.parametrize("name", ["quint8", "qint8", "qint32", "quint4x2", "bits8"])
def test_quantised_numbers_are_refused(name: str, tmp_path: Path) -> None:
    """torch.as_strided crashes the process for such a tensor without a quantizer."""
    program = storage_program(4, 4).replace(b"FloatStorage", name.encode())
    for zipped in (True, False):
        check_refused(write_torch_file(tmp_path / "x.pt", program, zipped), "quantised", name)


def write_archive(path: Path, program: bytes, storage: str, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr(f"archive/data/{storage}", data)
    return path


def test_a_file_cannot_enlarge_a_tensor(tmp_path: Path) -> None:
    """BUILD calls Tensor.__setstate__, and so Tensor.set_."""
    tensor = storage_program(0, 0).removeprefix(b"\x80\x02").removesuffix(b".")
    program = b"\x80\x02" + tensor + b"(" + tensor + b"I0\n(I1048576\nt(I1\nttb."
    check_refused(write_archive(tmp_path / "x.pt", program, "0", b""), "resize")


def test_a_storage_with_two_keys_of_the_same_text_is_read_once(tmp_path: Path) -> None:
    """The keys are two different objects, both written as "{}"."""
    storage = b"(S'storage'\nctorch\nFloatStorage\nca\nb\n)RS'cpu'\nI4\ntQ"
    program = b"\x80\x02(" + storage + storage + b"t."
    a, b = safe_load(write_archive(tmp_path / "x.pt", program, "{}", bytes(16)))
    assert a.data_ptr() == b.data_ptr()


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", storage_program(2**22, 4))
        archive.writestr("archive/data/0", bytes(2**24))
    check_refused(tmp_path / "x.pt", "larger than the file")
