"""Checkpoints: whole or not at all, exact, and never code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import configuration_changes, load_checkpoint, save_checkpoint

STATE: dict[str, Any] = {
    "step": 7,
    "settings": {"lr": 0.1, "blur_p": [1.0, 0.1], "width": None, "precision": "auto"},
    "model": {"weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor(3)},
    "optimizer": {"state": {0: {"mu": torch.tensor([1.5, -0.0, torch.inf], dtype=torch.float64)}}},
}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, signs of zero included."""

    def frozen(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.dtype, tuple(x.shape), x.numpy().tobytes()
        return {k: frozen(v) for k, v in x.items()} if isinstance(x, dict) else x

    return bool(frozen(a) == frozen(b))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_comes_back_to_the_bit(saved: Path) -> None:
    assert same(load_checkpoint(saved), STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_is_an_ordinary_torch_file(saved: Path) -> None:
    assert same(torch.load(saved, weights_only=True), STATE)
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    """Each byte of the archive's ends, where its structure lies, and every seventh between."""
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
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrap", [pickle.dump, torch.save, save_checkpoint])
def test_code_in_a_checkpoint_is_refused_and_never_runs(
    tmp_path: Path, wrap: Callable[..., None]
) -> None:
    """Even where the checksum holds: whoever sends a file can compute it."""
    path, state = tmp_path / "checkpoint.pt", {"step": 1, "model": Bomb(tmp_path / "ran")}
    if wrap is save_checkpoint:
        wrap(path, state)
    else:
        buffer = io.BytesIO()
        wrap(state, buffer)
        path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "this test can fail"


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pt: No such file"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "the first write", "a later write"])
def test_a_save_that_dies_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> Any:
        raise full

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return (
                fail() if place == "the first write" or self.tell() > 500 else super().write(data)
            )

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", Full) if place.endswith("write") else (place, fail)))
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(saved, STATE | {"step": 8})
    assert same(load_checkpoint(saved), STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]
    save_checkpoint(saved, STATE | {"step": 8})
    assert load_checkpoint(saved)["step"] == 8


def test_the_new_checkpoint_is_on_the_disk_before_it_takes_the_old_ones_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        size = os.fstat(fd).st_size
        sync(fd)
        done.append(f"fsync of {'all' if size == saved.stat().st_size else size}")

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"replace {Path(target).name}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    save_checkpoint(saved, STATE)
    assert done[:2] == ["fsync of all", "replace checkpoint.pt"]


def test_what_a_killed_save_left_is_cleared_by_the_next_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL runs no `except`: the temporary file stays, as large as a checkpoint, once for each kill."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(os, "getpid", lambda: 12345)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(saved, STATE)
    assert len(list(saved.parent.iterdir())) == 2
    save_checkpoint(saved, STATE)
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_settings_that_differ_are_named_with_both_values() -> None:
    now = {"lr": 0.2, "width": 64, "seed": 0}
    changes = configuration_changes({"lr": 0.1, "width": 64, "old": 1}, now)
    assert changes == [
        "lr: 0.1 saved, 0.2 now",
        "old: 1 saved, nothing now",
        "seed: nothing saved, 0 now",
    ]
    assert configuration_changes(now, dict(now)) == []
