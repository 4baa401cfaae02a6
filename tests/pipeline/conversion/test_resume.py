"""A conversion that was killed, or stopped by a full disk, resumes to the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import FORMATS, verify_store
from pipeline.conversion.journal import read_journal
from tests.helpers.conversions import TARGETS, Killed, convert_to, files_in
from tests.helpers.images import encoded, picture, write_photos

KillAt = Callable[[int], None]


def convert_until_killed(source: Path, folder: Path, format: str, kill_at: KillAt, k: int) -> Path:
    """Kill a conversion at its k-th change to a file; return the unfinished file."""
    kill_at(k)
    with pytest.raises(Killed):
        convert_to(source, folder, format)
    kill_at(0)
    (unfinished,) = folder.rglob("*.growing")
    return unfinished


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty folders: one for a conversion without a kill, one for a conversion with kills."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    return whole, killed


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("format", FORMATS)
def test_kill_at_any_point_resumes_to_the_same_bytes(
    tmp_path: Path, folders: tuple[Path, Path], format: str, kill_at: KillAt
) -> None:
    whole, killed = folders
    source = write_photos(tmp_path / "source", 24)
    (source / "class0" / "bad.jpg").write_bytes(b"no image")
    convert_to(source, whole, format, shards=2)
    expected = files_in(whole)
    for k in range(1, 1000):
        kill_at(k)
        try:
            convert_to(source, killed, format, shards=2)
            break
        except Killed:
            kill_at(0)
        convert_to(source, killed, format, shards=2)
        assert files_in(killed) == expected, k
        shutil.rmtree(killed)
        killed.mkdir()
    assert k > 15


def test_kill_leaves_no_half_written_index(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    kill_at: KillAt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The conversion that is killed and the one that resumes it are two processes."""
    photos = write_photos(tmp_path_factory.mktemp("source"), 6)
    convert_to(photos, tmp_path, "beton")
    expected = files_in(tmp_path)
    for k in range(2, 100):
        for path in tmp_path.iterdir():
            path.unlink()
        kill_at(k)
        try:
            convert_to(photos, tmp_path, "beton")
            break
        except Killed:
            kill_at(0)
        with monkeypatch.context() as other_process:
            other_process.setattr(os, "getpid", lambda: 1)
            convert_to(photos, tmp_path, "beton")
        assert files_in(tmp_path) == expected, k
    kill_at(0)
    assert k > 6


def test_kill_while_the_index_is_written_leaves_nothing_beside_the_target(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed_replace(old: Path, new: Path) -> None:
        if "index.npz" in Path(old).name:
            raise Killed
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed_replace)
    with pytest.raises(Killed):
        convert_to(photos, tmp_path, "beton")
    assert [path.name for path in tmp_path.iterdir()] == ["x.beton.partial"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("format", FORMATS)
def test_records_lost_by_a_power_failure_are_written_again(
    photos: Path, folders: tuple[Path, Path], format: str, kill_at: KillAt
) -> None:
    """The end of a file may be lost although the journal covers it."""
    whole, killed = folders
    convert_to(photos, whole, format)
    unfinished = convert_until_killed(photos, killed, format, kill_at, 25)
    data = unfinished.read_bytes()
    kept = len(data) // 2
    unfinished.write_bytes(data[:kept] + bytes(len(data) - kept))
    convert_to(photos, killed, format)
    assert files_in(killed) == files_in(whole)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", ["before", "after", "rejects"])
def test_bytes_lost_around_an_image_are_written_again(
    tmp_path: Path, folders: tuple[Path, Path], format: str, part: str, kill_at: KillAt
) -> None:
    whole, killed = folders
    source = write_photos(tmp_path / "source", 40)
    for i in range(30):
        (source / "class0" / f"bad{i}.jpg").write_bytes(b"no image")
    convert_to(source, whole, format)
    unfinished = convert_until_killed(source, killed, format, kill_at, 25)
    if part == "rejects":
        (lines,) = killed.rglob("*.rejects.jsonl")
        assert lines.read_bytes().count(b"\n") > 3
        lines.write_bytes(lines.read_bytes().splitlines(keepends=True)[0])
    else:
        journal = read_journal(unfinished.with_suffix(".rows"))
        row = [row for row in journal if row["bytes"]][3]
        start = int(row["offset"])
        end = int(row["offset"] + row["bytes"])
        if part == "before":
            lost = slice(start - (20 if format == "tfrecord" else 300), start)
        else:
            lost = slice(end, int(row["end"]))
        data = bytearray(unfinished.read_bytes())
        data[lost] = bytes(len(data[lost]))
        unfinished.write_bytes(data)
    convert_to(source, killed, format)
    assert files_in(killed) == files_in(whole)


@pytest.mark.parametrize("format", FORMATS)
def test_conversion_resumes_after_a_full_disk(
    photos: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.beton").write_bytes(b"precious")
    bytes_free = 60_000

    def writev(fd: int, parts: list[bytes]) -> int:
        nonlocal bytes_free
        data = b"".join(parts)[:bytes_free]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        bytes_free -= len(data)
        return os.write(fd, data)

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "writev", writev)
        with pytest.raises(OSError, match="No space left") as full:
            convert_to(photos, tmp_path, format)
    assert full.value.__notes__ == ["once that is fixed, run the same command to continue"]
    assert not (tmp_path / TARGETS[format]).exists()
    convert_to(photos, tmp_path, format)
    assert verify_store(tmp_path / TARGETS[format], photos) == []
    assert (tmp_path / "other.beton").read_bytes() == b"precious"


def test_shard_that_a_worker_still_writes_is_not_touched(
    photos: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    unfinished = convert_until_killed(photos, tmp_path, "webdataset", kill_at, 2)
    with open(unfinished, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"shard-00000\.tar is still being written"):
            convert_to(photos, tmp_path, "webdataset")
    assert convert_to(photos, tmp_path, "webdataset").images == 60


def test_source_that_changed_since_the_kill_is_refused(tmp_path: Path, kill_at: KillAt) -> None:
    source = write_photos(tmp_path / "source", 12)
    convert_until_killed(source, tmp_path, "beton", kill_at, 4)
    (source / "class0" / "new.jpg").write_bytes(encoded(picture(30, 30)))
    message = (
        r"unfinished conversion .* with other options \(identity .*images 12 instead of 13\): "
        r"run the earlier command to finish it, or delete it"
    )
    with pytest.raises(ValueError, match=message):
        convert_to(source, tmp_path, "beton")
    shutil.rmtree(tmp_path / "x.beton.partial")
    assert convert_to(source, tmp_path, "beton").images == 13


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_damaged_plan_of_an_unfinished_conversion_is_named(
    photos: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "x.beton.partial").mkdir()
    (tmp_path / "x.beton.partial" / "plan.json").write_bytes(content)
    message = r"plan\.json is damaged .*: delete .*x\.beton\.partial, and start again"
    with pytest.raises(ValueError, match=message):
        convert_to(photos, tmp_path, "beton")


def test_lock_that_another_conversion_has_replaced_is_not_taken(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the file, one conversion ends, and another one begins."""
    flock = fcntl.flock
    partial = tmp_path / "x.beton.partial"

    def late_flock(*arguments: Any) -> None:
        shutil.rmtree(partial)
        partial.mkdir()
        (partial / "lock").touch()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    with pytest.raises(ValueError, match="another conversion is writing"):
        convert_to(photos, tmp_path, "beton")
    assert (partial / "lock").exists()
