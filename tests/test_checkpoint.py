"""Checkpoints: whole or not at all, exact, and never code."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Checkpoints, LastStep, configuration_changes, load_checkpoint, save_checkpoint

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
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path: Path, wrap: Callable[..., None]) -> None:
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
def test_a_save_that_dies_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> Any:
        raise full

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return fail() if place == "the first write" or self.tell() > 500 else super().write(data)

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


def test_what_a_killed_save_left_is_cleared_by_the_next_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert changes == ["lr: 0.1 saved, 0.2 now", "old: 1 saved, nothing now", "seed: nothing saved, 0 now"]
    assert configuration_changes(now, dict(now)) == []


# ── the checkpoints of a run ─────────────────────────────────────────────────────────────────────────────────────────


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
    write_run(tmp_path, [12, 13], keep=1, milestone_steps=4)  # this run has not loaded what it goes on from
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
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*0003\.pt.*0002\.pt.*nothing to resume from"):
        Checkpoints(tmp_path).load()


def test_a_missing_newest_one_is_no_damage(tmp_path: Path) -> None:
    write_run(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoint.pt").unlink()
    state, lines = Checkpoints(tmp_path).load()
    assert same(state, at(2))
    assert lines == []
    with pytest.raises(ValueError, match=r"absent.checkpoint\.pt: No such file.*nothing to resume from"):
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
    command, root = [sys.executable, "-c", KILLS, *map(str, starts)], Path(__file__).parent.parent
    lines = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    for start in starts:
        kills = [line.split()[1:] for line in lines if line.startswith(start.name)]
        steps = [int(step) for step, *_ in kills]
        assert steps == sorted(steps)
        assert set(steps) == {int(start.name), 7}
        for step, *left in kills:
            assert set(left) == named(int(step))


def test_an_error_comes_up_once_and_the_next_save_is_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation of a save on files fails in turn, until there is none left."""
    write_run(tmp_path / "run", [1, 2, 3])
    failed = 0
    for number in range(20):
        folder, done = tmp_path / str(number), []
        shutil.copytree(tmp_path / "run", folder)

        def failing(function: Callable[..., Any], number: int, done: list[str], *rest: Any, **named: Any) -> Any:
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


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        weight.add_(1)  # the copy for the second is taken when its turn comes: there is only ever one
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
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
                checkpoints.save(at(2))
                concurrent.futures.wait([checkpoints._writing])
            if surfaces != "exit":
                checkpoints.save(at(3)) if surfaces == "save" else checkpoints.wait()

    with pytest.raises(OSError, match=r"No space left; what was there before is unchanged.*checkpoint\.pt"):
        loop()
    assert set(threading.enumerate()) == threads
    assert contents(tmp_path).keys() == {"checkpoint.pt"}
    assert same(Checkpoints(tmp_path).load()[0], at(1))


def test_what_ends_a_run_is_not_hidden_by_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))

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
    for step, name in ((1, "checkpoint-00000001.pt"), (2, "checkpoint-00000002.pt"), (3, "checkpoint.pt")):
        assert bool((load_checkpoint(tmp_path / name)["weight"] == step).all())


# ── the last step ────────────────────────────────────────────────────────────────────────────────────────────────────


def norms(seed: int = 0) -> torch.nn.Module:
    """Averages of several types and shapes, with another value in each place."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).double())
    network.register_buffer("table", torch.empty(2, 2))
    network.register_buffer("seen", torch.tensor([True, False]))
    for buffer in network.buffers():
        buffer.copy_(torch.randn(buffer.shape) * 100)
    return network


def averages(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def nothing() -> torch.Tensor:
    return torch.tensor(0.0)


def spoil(network: torch.nn.Module) -> None:
    """What a forward pass on views that overflow leaves."""
    for buffer in network.buffers():
        buffer.copy_(torch.full_like(buffer, torch.nan) if buffer.is_floating_point() else ~buffer)


def test_a_skipped_step_leaves_the_averages_as_they_were() -> None:
    network, verdict = norms(), torch.tensor(0.0)
    with LastStep(network, at, None, 0) as last:
        for skipped in (1.0, 0.0, 1.0, 1.0, 0.0):
            before = averages(network)
            for buffer in network.buffers():
                buffer.copy_(torch.randn(buffer.shape) * 100)
            if skipped:
                spoil(network)
            made = averages(network)
            assert not same(before, made)
            with last.update(lambda: verdict):
                verdict.fill_(skipped)  # which the optimizer only knows afterwards
            assert same(averages(network), before if skipped else made)


def test_a_rescue_saves_the_averages_of_the_last_step_that_was_not_skipped(tmp_path: Path) -> None:
    network = norms()
    verdicts = iter([torch.tensor(0.0), torch.tensor(1.0)])

    def loop(checkpoints: Checkpoints) -> None:
        with LastStep(network, lambda step: {"step": step, "model": network.state_dict()}, checkpoints, 0) as last:
            with last.update(lambda: next(verdicts)):
                pass
            spoil(network)
            with last.update(lambda: next(verdicts)):
                pass
            spoil(network)  # a third step's forward pass
            raise KeyError

    before = averages(network)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyError) as caught:
        loop(checkpoints)
    assert caught.value.__notes__ == [
        f"it ended after step 2, which is saved in {tmp_path}/checkpoint.pt: --resume goes on from there"
    ]
    state, _ = Checkpoints(tmp_path).load()
    assert state["step"] == 2
    assert same({name: state["model"][name] for name in before}, before)


def test_a_step_that_does_not_reach_the_disk_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))

    def loop(checkpoints: Checkpoints, error: Exception) -> None:
        with LastStep(norms(), at, checkpoints, 0) as last:
            with last.update(nothing):
                pass
            last.save()
            raise error

    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as checkpoints:
        loop(checkpoints, KeyError())
    (note,) = caught.value.__notes__
    assert note.startswith("it ended after step 1, which cannot be saved (")
    assert "No space left" in note
    assert note.endswith("): nothing is saved to go on from")
    with pytest.raises(FloatingPointError) as diverged, Checkpoints(tmp_path) as checkpoints:
        loop(checkpoints, FloatingPointError())
    assert not hasattr(diverged.value, "__notes__")
