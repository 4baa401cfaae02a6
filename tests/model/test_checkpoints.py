"""The checkpoints of a run: which stay, which is loaded, and saving beside the training."""

from __future__ import annotations

import concurrent.futures
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
from tests.model.test_checkpoint import STATE, same


def at(step: int) -> dict[str, Any]:
    """The state after that step, which can be told from that of any other."""
    return STATE | {"step": step, "model": {"weight": torch.arange(12.0) + step}}


def write_run(folder: Path, steps: Iterable[int], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(at(step))
    return folder


def named(*steps: int) -> set[str]:
    """The newest, and those of these steps."""
    return {"checkpoint.pt", *(f"checkpoint-{step:08d}.pt" for step in steps)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_last_ones_and_the_milestones_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best.pt").write_bytes(b"somebody's own")
    write_run(tmp_path, range(1, 12), keep=3, milestone_steps=4)
    assert names(tmp_path) - {"checkpoint-best.pt"} == named(4, 8, 9, 10)
    for step in (4, 8, 9, 10):
        assert same(load_checkpoint(tmp_path / f"checkpoint-{step:08d}.pt"), at(step))
    assert same(load_checkpoint(tmp_path / "checkpoint.pt"), at(11))
    write_run(
        tmp_path, [12, 13], keep=1, milestone_steps=4
    )  # this run has not loaded what it goes on from
    assert names(tmp_path) - {"checkpoint-best.pt"} == named(4, 8, 12)
    assert (tmp_path / "checkpoint-best.pt").exists()


def test_a_step_that_is_saved_twice_counts_once(tmp_path: Path) -> None:
    assert names(write_run(tmp_path, [1, 2, 2], keep=2)) == named(1)
    assert same(Checkpoints(tmp_path).load()[0], at(2))


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:700] + bytes([data[700] ^ 4]) + data[701:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: torch.save(at(99), path),
    "of another layout": lambda path: save_checkpoint(path, {"epoch": 3}),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_whole_one_is_loaded_and_the_damaged_are_named(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write_run(tmp_path, [1, 2, 3, 4])
    damage(tmp_path / "checkpoint.pt")
    damage(tmp_path / "checkpoint-00000003.pt")
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    state, lines = Checkpoints(tmp_path).load()
    assert same(state, at(2))
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


def test_a_missing_newest_one_is_no_damage(tmp_path: Path) -> None:
    write_run(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoint.pt").unlink()
    state, lines = Checkpoints(tmp_path).load()
    assert same(state, at(2))
    assert lines == []
    with pytest.raises(
        ValueError, match=r"absent.checkpoint\.pt: No such file.*nothing to resume from"
    ):
        Checkpoints(tmp_path / "absent").load()


@pytest.mark.parametrize("loaded", [True, False])
def test_a_run_that_fell_back_keeps_nothing_damaged(tmp_path: Path, loaded: bool) -> None:
    """Those beyond the step it fell back to are gone, milestones too, and never counted or taken for newer ones."""
    write_run(tmp_path, range(1, 7), keep=4, milestone_steps=2)
    for damaged in named(4, 5):
        flip(tmp_path / damaged)
    with Checkpoints(tmp_path, keep=4, milestone_steps=2) as checkpoints:
        if loaded:
            assert checkpoints.load()[0]["step"] == 3
        checkpoints.save(at(7))
    assert names(tmp_path) == named(2, 3)
    flip(tmp_path / "checkpoint.pt")
    assert same(Checkpoints(tmp_path).load()[0], at(3))


def test_a_future_that_was_given_up_is_never_taken_for_newer(tmp_path: Path) -> None:
    """Somebody puts an older checkpoint in the place of the newest, and goes on from that."""
    write_run(tmp_path, range(1, 7), milestone_steps=2, keep=9)
    shutil.copy(tmp_path / "checkpoint-00000003.pt", tmp_path / "checkpoint.pt")
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        assert checkpoints.load()[0]["step"] == 3
        checkpoints.save(at(9))
    assert names(tmp_path) == named(1, 2, 3)


KILLS = """
import itertools, os, pathlib, shutil, sys, torch
from model import Checkpoints

def killed(folder, number, step):
    # Save that step in another process, which is gone just before its operation of that number.
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


def test_a_save_that_is_killed_leaves_the_one_before_or_the_new_one(tmp_path: Path) -> None:
    """At each of its operations on files, in a run that fell back and in one that did not. The next save is whole."""
    starts = [tmp_path / "4", tmp_path / "3", tmp_path / "2"]  # the newest whole one there
    for start in starts:
        write_run(start, [1, 2, 3, 4], keep=4)
        for name in ("checkpoint.pt", "checkpoint-00000003.pt")[: 4 - int(start.name)]:
            flip(start / name)
    command, root = [sys.executable, "-c", KILLS, *map(str, starts)], Path(__file__).parents[2]
    lines = subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for start in starts:
        kills = [line.split()[1:] for line in lines if line.startswith(start.name)]
        steps = [int(step) for step, *_ in kills]
        assert steps == sorted(steps)
        assert set(steps) == {int(start.name), 7}
        for step, *left in kills:
            assert set(left) == named(int(step))


def test_an_error_comes_up_once_and_the_next_save_is_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation of a save on files fails in turn, until there is none left."""
    write_run(tmp_path / "run", [1, 2, 3])
    failed = 0
    for number in range(20):
        folder, done = tmp_path / str(number), []
        shutil.copytree(tmp_path / "run", folder)

        def failing(
            function: Callable[..., Any], number: int, done: list[str], *rest: Any, **named: Any
        ) -> Any:
            done.append(function.__name__)
            if len(done) == number + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*rest, **named)

        with Checkpoints(folder) as checkpoints:
            checkpoints.load()
            with monkeypatch.context() as patch:
                for name in ("fsync", "replace", "unlink"):
                    patch.setattr(os, name, partial(failing, getattr(os, name), number, done))
                checkpoints.save(at(4))
                try:
                    checkpoints.wait()
                except OSError:
                    failed += 1
                checkpoints.wait()
            assert Checkpoints(folder).load()[0]["step"] == checkpoints.step
            checkpoints.save(at(5))
        assert same(Checkpoints(folder).load()[0], at(5))
        assert names(folder) <= named(2, 3, 4)
        assert not [path for path in names(folder) if path.endswith(".tmp")]
        for step in (2, 3, 4):
            path = folder / f"checkpoint-{step:08d}.pt"
            assert not path.exists() or same(load_checkpoint(path), at(step))
        if number >= len(done):
            break
    assert done == ["fsync", "replace", "replace", "fsync", "unlink"]
    assert failed == 4  # the folder's fsync is not to be had everywhere


class Held:
    """torch.save, which waits until it is let go; with a limit, for a test that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self._save = threading.Event(), threading.Event(), torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, *rest: Any) -> None:
        self.begun.set()
        assert self.go.wait(20)
        self._save(*rest)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    values, whole = {"loss": [1.0]}, copy.deepcopy(network.state_dict())
    held = Held(monkeypatch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"step": 1, "model": network.state_dict(), "values": values})
        assert held.begun.wait(20)
        network.train()(torch.randn(2, 3, 8, 8))
        for parameter in network.parameters():
            parameter.data.add_(1)
        values["loss"].append(2.0)
        assert names(tmp_path) == {".checkpoint.pt.tmp"}
        held.go.set()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert same(state["model"], whole)
    assert state["values"] == {"loss": [1.0]}
    assert state["model"]._metadata == whole._metadata
    assert state["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, weight = Held(monkeypatch), torch.zeros(3)
    held.go.set()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"step": 0})
        checkpoints.wait()
        held.go.clear()
        checkpoints.save({"step": 1, "weight": weight})
        second = threading.Thread(target=checkpoints.save, args=({"step": 2, "weight": weight},))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        weight.add_(
            1
        )  # the copy for the second is taken when its turn comes: there is only ever one
        held.go.set()
        second.join(20)
        checkpoints.wait()
        assert checkpoints.step == 2
    assert load_checkpoint(tmp_path / "checkpoint-00000001.pt")["weight"].tolist() == [0, 0, 0]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("surfaces", ["save", "wait", "exit"])
def test_a_full_disk_is_said_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surfaces: str
) -> None:
    threads = set(threading.enumerate())

    def loop() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(at(1))
            checkpoints.wait()
            with monkeypatch.context() as patch:
                patch.setattr(
                    os,
                    "fsync",
                    lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")),
                )
                checkpoints.save(at(2))
                concurrent.futures.wait([checkpoints._writing])
            if surfaces != "exit":
                checkpoints.save(at(3)) if surfaces == "save" else checkpoints.wait()

    with pytest.raises(
        OSError, match=r"No space left; the file that was there before is unchanged.*checkpoint\.pt"
    ):
        loop()
    assert set(threading.enumerate()) == threads
    assert contents(tmp_path).keys() == {"checkpoint.pt"}
    assert same(Checkpoints(tmp_path).load()[0], at(1))


def test_what_ends_a_run_is_not_hidden_by_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )

    def loop() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(at(1))
            raise KeyError

    with pytest.raises(KeyError):
        loop()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_copy_from_the_gpu_is_of_the_step_it_was_asked_in(tmp_path: Path) -> None:
    """Save returns while the device still has work before the copy, and what is queued afterwards is not in it."""
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
