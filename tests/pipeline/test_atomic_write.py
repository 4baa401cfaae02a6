"""Atomic writes of files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.atomic_write import atomic_write, create_folder_once


@pytest.mark.parametrize("concurrent", [False, True])
def test_the_file_is_replaced_only_at_the_end(tmp_path: Path, concurrent: bool) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with atomic_write(target, concurrent=concurrent) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, concurrent: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail_halfway() -> None:
        with atomic_write(target, concurrent=concurrent) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_concurrent_writers_have_temporary_files_of_their_own(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_write(target, concurrent=True) as file:
        assert str(os.getpid()) in Path(file.name).name
        file.write(b"ours")
        target.with_name("file.1.tmp").write_bytes(b"of another process")
    assert target.read_bytes() == b"ours"


def test_a_folder_is_filled_once(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "folder"

    def fill(folder: Path) -> None:
        assert not target.exists()
        (folder / "file").write_bytes(b"content")

    assert create_folder_once(target, fill) == target
    assert (target / "file").read_bytes() == b"content"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755
    assert create_folder_once(target, lambda folder: pytest.fail("filled again")) == target


def test_a_folder_of_another_process_is_used_if_it_was_first(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def fill(folder: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        (folder / "ours").touch()

    assert create_folder_once(target, fill) == target
    assert list(target.iterdir()) == [target / "theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_filled_is_removed(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_folder_once(tmp_path / "folder", fill)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_killed_processes_left_are_removed_after_an_hour(tmp_path: Path) -> None:
    old = tmp_path / ".folder-old"
    recent = tmp_path / ".folder-recent"
    for leftover in (old, recent):
        (leftover / "half").mkdir(parents=True)
    os.utime(old, (0, 0))
    target = create_folder_once(tmp_path / "folder", lambda folder: None)
    assert set(tmp_path.iterdir()) == {recent, target}
