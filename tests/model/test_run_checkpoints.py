"""The checkpoints of a run: which are kept, which one is loaded, and saving in the background."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Checkpoints, load_checkpoint, save_checkpoint
from tests.helpers.checkpoints import equal_to_the_bit, raise_disk_full, state_at


def write_run(folder: Path, steps: Iterable[int], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step))
    return folder


def expected_names(*steps: int) -> set[str]:
    """File names of the newest checkpoint and of those of these steps."""
    return {"checkpoint.pt", *(f"checkpoint-{step:08d}.pt" for step in steps)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_checkpoints_and_the_milestones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best.pt").write_bytes(b"a file of the user")
    write_run(tmp_path, range(1, 12), keep=3, milestone_steps=4)
    assert names(tmp_path) - {"checkpoint-best.pt"} == expected_names(4, 8, 9, 10)
    for step in (4, 8, 9, 10):
        assert equal_to_the_bit(
            load_checkpoint(tmp_path / f"checkpoint-{step:08d}.pt"), state_at(step)
        )
    assert equal_to_the_bit(load_checkpoint(tmp_path / "checkpoint.pt"), state_at(11))
    write_run(tmp_path, [12, 13], keep=1, milestone_steps=4)  # without loading a checkpoint first
    assert names(tmp_path) - {"checkpoint-best.pt"} == expected_names(4, 8, 12)
    assert (tmp_path / "checkpoint-best.pt").exists()


def test_a_step_that_is_saved_twice_is_one_checkpoint(tmp_path: Path) -> None:
    assert names(write_run(tmp_path, [1, 2, 2], keep=2)) == expected_names(1)
    assert equal_to_the_bit(Checkpoints(tmp_path).load()[0], state_at(2))


def flip_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:700] + bytes([data[700] ^ 4]) + data[701:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "without a checksum": lambda path: torch.save(state_at(99), path),
    "without a step": lambda path: save_checkpoint(path, {"epoch": 3}),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_intact_checkpoint_is_loaded_and_damaged_ones_are_reported(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write_run(tmp_path, [1, 2, 3, 4])
    damage(tmp_path / "checkpoint.pt")
    damage(tmp_path / "checkpoint-00000003.pt")
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    checkpoints = Checkpoints(tmp_path)
    state, lines = checkpoints.load()
    assert equal_to_the_bit(state, state_at(2))
    assert (checkpoints.step, checkpoints.loaded_path) == (2, tmp_path / "checkpoint-00000002.pt")
    assert len(lines) == 2
    for line, bad in zip(lines, ("checkpoint.pt", "checkpoint-00000003.pt"), strict=True):
        assert line.startswith(str(tmp_path / bad))
        assert line.endswith(f"{tmp_path / 'checkpoint-00000002.pt'} (step 2) is used instead")
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())] == before
    damage(tmp_path / "checkpoint-00000002.pt")
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt.*0003\.pt.*0002\.pt.*nothing to resume from"
    ):
        Checkpoints(tmp_path).load()


def test_a_missing_newest_checkpoint_is_not_reported_as_damaged(tmp_path: Path) -> None:
    write_run(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoint.pt").unlink()
    state, lines = Checkpoints(tmp_path).load()
    assert equal_to_the_bit(state, state_at(2))
    assert lines == []
    with pytest.raises(
        ValueError, match=r"absent.checkpoint\.pt: No such file.*nothing to resume from"
    ):
        Checkpoints(tmp_path / "absent").load()


@pytest.mark.parametrize("loaded", [True, False])
def test_a_run_that_resumed_from_an_earlier_checkpoint_deletes_the_damaged_ones(
    tmp_path: Path, loaded: bool
) -> None:
    """Later ones are deleted, milestones too: they must not count for `keep` or be loaded again."""
    write_run(tmp_path, range(1, 7), keep=4, milestone_steps=2)
    for damaged in expected_names(4, 5):
        flip_bit(tmp_path / damaged)
    with Checkpoints(tmp_path, keep=4, milestone_steps=2) as checkpoints:
        if loaded:
            assert checkpoints.load()[0]["step"] == 3
        checkpoints.save(state_at(7))
    assert names(tmp_path) == expected_names(2, 3)
    flip_bit(tmp_path / "checkpoint.pt")
    assert equal_to_the_bit(Checkpoints(tmp_path).load()[0], state_at(3))


def test_checkpoints_of_an_abandoned_continuation_are_deleted(tmp_path: Path) -> None:
    """A user replaces the newest checkpoint by an older one and resumes."""
    write_run(tmp_path, range(1, 7), milestone_steps=2, keep=9)
    shutil.copy(tmp_path / "checkpoint-00000003.pt", tmp_path / "checkpoint.pt")
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        assert checkpoints.load()[0]["step"] == 3
        checkpoints.save(state_at(9))
    assert names(tmp_path) == expected_names(1, 2, 3)


KILLS = """
import itertools, os, pathlib, shutil, sys, torch
from model import Checkpoints

def killed(folder, number, step):
    # Save that step in another process, which exits just before its file operation of that number.
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    done = itertools.count()
    def deadly(function):
        return lambda *a, **k: os._exit(9) if next(done) == number else function(*a, **k)
    torch.save = deadly(torch.save)
    for name in ("open", "fsync", "replace", "rename", "unlink", "remove"):
        setattr(os, name, deadly(getattr(os, name)))
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.load()
        checkpoints.save({"step": step})
    os._exit(0)

for start in map(pathlib.Path, sys.argv[1:]):
    for number in itertools.count():
        folder = start.with_name(f"{start.name}-{number}")
        shutil.copytree(start, folder)
        if not killed(folder, number, 7):
            break
        with Checkpoints(folder, keep=2) as checkpoints:
            loaded = checkpoints.load()[0]["step"]
            checkpoints.save({"step": 8})
        print(start.name, loaded, *sorted(path.name for path in folder.iterdir()))
"""


def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """At each of its file operations, in runs with and without damaged checkpoints."""
    starts = [tmp_path / "4", tmp_path / "3", tmp_path / "2"]  # named after the newest intact step
    for start in starts:
        write_run(start, [1, 2, 3, 4], keep=4)
        for name in ("checkpoint.pt", "checkpoint-00000003.pt")[: 4 - int(start.name)]:
            flip_bit(start / name)
    command = [sys.executable, "-c", KILLS, *map(str, starts)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    for start in starts:
        kills = [line.split()[1:] for line in lines if line.startswith(start.name)]
        steps = [int(step) for step, *_ in kills]
        assert steps == sorted(steps)
        assert set(steps) == {int(start.name), 7}
        for step, *left in kills:
            assert set(left) == expected_names(int(step))


def test_an_error_is_raised_once_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file operation of a save fails in turn."""
    write_run(tmp_path / "run", [1, 2, 3])
    failed = 0
    for number in range(20):
        folder = tmp_path / str(number)
        done: list[str] = []
        shutil.copytree(tmp_path / "run", folder)

        def failing(
            function: Callable[..., Any], number: int, done: list[str], *rest: Any, **kwargs: Any
        ) -> Any:
            done.append(function.__name__)
            if len(done) == number + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*rest, **kwargs)

        with Checkpoints(folder) as checkpoints:
            checkpoints.load()
            with monkeypatch.context() as patch:
                for name in ("fsync", "replace", "unlink"):
                    patch.setattr(os, name, partial(failing, getattr(os, name), number, done))
                checkpoints.save(state_at(4))
                try:
                    checkpoints.wait()
                except OSError:
                    failed += 1
                checkpoints.wait()
            assert Checkpoints(folder).load()[0]["step"] == checkpoints.step
            checkpoints.save(state_at(5))
        assert equal_to_the_bit(Checkpoints(folder).load()[0], state_at(5))
        assert names(folder) <= expected_names(2, 3, 4)
        assert not [path for path in names(folder) if path.endswith(".tmp")]
        for step in (2, 3, 4):
            path = folder / f"checkpoint-{step:08d}.pt"
            assert not path.exists() or equal_to_the_bit(load_checkpoint(path), state_at(step))
        if number >= len(done):
            break
    assert done == ["fsync", "replace", "replace", "fsync", "unlink"]
    assert failed == 4  # not for the fsync of the folder, which some file systems cannot do


class PausedSave:
    """Replaces torch.save by one that waits for `go`, for at most 20 seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self._save = torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, *rest: Any) -> None:
        self.begun.set()
        assert self.go.wait(20)
        self._save(*rest)


def test_changes_after_save_do_not_reach_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    values = {"loss": [1.0]}
    saved = copy.deepcopy(network.state_dict())
    paused_save = PausedSave(monkeypatch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"step": 1, "model": network.state_dict(), "values": values})
        assert paused_save.begun.wait(20)
        network.train()(torch.randn(2, 3, 8, 8))
        for parameter in network.parameters():
            parameter.data.add_(1)
        values["loss"].append(2.0)
        assert names(tmp_path) == {".checkpoint.pt.tmp"}
        paused_save.go.set()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert equal_to_the_bit(state["model"], saved)
    assert state["values"] == {"loss": [1.0]}
    assert state["model"]._metadata == saved._metadata
    assert state["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused_save = PausedSave(monkeypatch)
    weight = torch.zeros(3)
    paused_save.go.set()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"step": 0})
        checkpoints.wait()
        paused_save.go.clear()
        checkpoints.save({"step": 1, "weight": weight})
        second = threading.Thread(target=checkpoints.save, args=({"step": 2, "weight": weight},))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        weight.add_(1)  # the second save copies the weights only after the first is written
        paused_save.go.set()
        second.join(20)
        checkpoints.wait()
        assert checkpoints.step == 2
    assert load_checkpoint(tmp_path / "checkpoint-00000001.pt")["weight"].tolist() == [0, 0, 0]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("raised_by", ["save", "wait", "exit"])
def test_a_full_disk_is_reported_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised_by: str
) -> None:
    threads = set(threading.enumerate())

    def loop() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state_at(1))
            checkpoints.wait()
            monkeypatch.setattr(os, "fsync", raise_disk_full)
            checkpoints.save(state_at(2))
            if raised_by == "save":
                checkpoints.save(state_at(3))
            if raised_by == "wait":
                checkpoints.wait()

    message = r"No space left on device; the file .* before is unchanged.*checkpoint\.pt"
    with pytest.raises(OSError, match=message):
        loop()
    monkeypatch.undo()
    assert set(threading.enumerate()) == threads
    assert contents(tmp_path).keys() == {"checkpoint.pt"}
    assert equal_to_the_bit(Checkpoints(tmp_path).load()[0], state_at(1))


def test_a_full_disk_does_not_hide_the_error_that_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_disk_full)

    def loop() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state_at(1))
            raise KeyError

    with pytest.raises(KeyError):
        loop()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_copy_from_the_gpu_has_the_values_at_the_call_of_save(tmp_path: Path) -> None:
    """Save returns before the device has finished; work that is queued later has no effect."""
    weight, busy = torch.zeros(1 << 24, device="cuda"), torch.randn(8192, 8192, device="cuda")
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):  # the first takes the pinned memory, which waits for the device
            for _ in range(30):
                busy = busy @ busy / busy.norm()
            weight.add_(1)
            checkpoints.save({"step": step, "weight": weight})
            returned_at_once = not torch.cuda.current_stream().query()
            weight.add_(100)
            weight.sub_(100)
    assert returned_at_once
    for step, name in (
        (1, "checkpoint-00000001.pt"),
        (2, "checkpoint-00000002.pt"),
        (3, "checkpoint.pt"),
    ):
        assert bool((load_checkpoint(tmp_path / name)["weight"] == step).all())
