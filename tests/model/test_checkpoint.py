"""Checkpoint files: saved atomically, restored exactly, and never run as code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from model import configuration_changes, load_checkpoint, save_checkpoint
from tests.helpers.checkpoints import STATE, equal_to_the_bit, raise_disk_full


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_load_returns_the_saved_state_to_the_bit(saved: Path) -> None:
    assert equal_to_the_bit(load_checkpoint(saved), STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_is_an_ordinary_torch_file(saved: Path) -> None:
    assert equal_to_the_bit(torch.load(saved, weights_only=True), STATE)
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    """Each byte at both ends, where the structure of the archive is, and every seventh between."""
    data = saved.read_bytes()
    for i in {*range(64), *range(0, len(data), 7), *range(len(data) - 100, len(data))}:
        saved.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
            load_checkpoint(saved)


@pytest.mark.parametrize("length", [0, 1, 70, 71, 300, -73, -71, -1])
def test_a_truncated_checkpoint_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(saved)


class Bomb:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [pickle.dump, torch.save, save_checkpoint])
def test_code_in_a_checkpoint_is_refused_and_never_runs(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    """Also with a valid checksum, which an attacker can compute."""
    path = tmp_path / "checkpoint.pt"
    state = {"step": 1, "model": Bomb(tmp_path / "ran")}
    if save is save_checkpoint:
        save(path, state)
    else:
        buffer = io.BytesIO()
        save(state, buffer)
        path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "this test can fail"


def test_the_error_for_a_missing_checkpoint_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pt: No such file"):
        load_checkpoint(tmp_path / "absent.pt")


class FullAtFirstWrite(io.FileIO):
    def write(self, data: Any) -> int:
        raise_disk_full()


class FullAtLaterWrite(io.FileIO):
    def write(self, data: Any) -> int:
        return raise_disk_full() if self.tell() > 500 else super().write(data)


@pytest.mark.parametrize(
    ("function", "replacement"),
    [
        ("os.replace", raise_disk_full),
        ("os.fsync", raise_disk_full),
        ("builtins.open", FullAtFirstWrite),
        ("builtins.open", FullAtLaterWrite),
    ],
    ids=["os.replace", "os.fsync", "the first write", "a later write"],
)
def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, function: str, replacement: object
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(function, replacement)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(saved, STATE | {"step": 8})
    assert equal_to_the_bit(load_checkpoint(saved), STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]

    save_checkpoint(saved, STATE | {"step": 8})
    assert load_checkpoint(saved)["step"] == 8


def test_the_new_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        size = os.fstat(fd).st_size
        sync(fd)
        calls.append(f"fsync of {'all' if size == saved.stat().st_size else size}")

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        calls.append(f"replace {Path(target).name}")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    save_checkpoint(saved, STATE)
    assert calls[:2] == ["fsync of all", "replace checkpoint.pt"]


def test_the_temporary_file_of_a_killed_save_is_overwritten_by_the_next_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL runs no `except`. One file as large as a checkpoint would be left for each kill."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(os, "getpid", lambda: 12345)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(saved, STATE)
    assert len(list(saved.parent.iterdir())) == 2

    save_checkpoint(saved, STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_changed_settings_are_named_with_both_values() -> None:
    now = {"lr": 0.2, "width": 64, "seed": 0}
    changes = configuration_changes({"lr": 0.1, "width": 64, "old": 1}, now)
    assert changes == [
        "lr: 0.1 saved, 0.2 now",
        "old: 1 saved, nothing now",
        "seed: nothing saved, 0 now",
    ]
    assert configuration_changes(now, dict(now)) == []
