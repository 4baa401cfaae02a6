"""The folder of a run: what it may contain, who may use it, and how a stop is recorded in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiment import INTERRUPTED, PREEMPTED, run_folder


def test_a_new_an_empty_and_a_used_run_folder_are_accepted(tmp_path: Path) -> None:
    run_folder.check(tmp_path / "new")
    run_folder.check(tmp_path)
    (tmp_path / ".lock").touch()
    (tmp_path / "preempted").touch()
    run_folder.check(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / "config.json").touch()
    run_folder.check(tmp_path)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} contains .*--run-folder"):
        run_folder.check(tmp_path)
    with pytest.raises(ValueError, match=r"photo\.jpg is a file: --run-folder"):
        run_folder.check(tmp_path / "photo.jpg")


def test_an_earlier_run_is_renamed_to_the_next_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_folder.make_room(folder) is None
    for number in (1, 2):
        (folder / "config.json").write_text(str(number))
        assert run_folder.make_room(folder) == tmp_path / f"run.{number}"
        assert os.listdir(folder) == []
    assert (tmp_path / "run.1" / "config.json").read_text() == "1"
    assert (tmp_path / "run.2" / "config.json").read_text() == "2"


def test_a_folder_in_use_is_neither_claimed_nor_renamed(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with run_folder.claim(tmp_path):
        for use in (run_folder.claim, run_folder.make_room):
            with pytest.raises(ValueError, match=f"{tmp_path}: choose another --run-folder"):
                use(tmp_path)
    run_folder.claim(tmp_path).close()


@pytest.mark.parametrize(
    ("status", "is_rank0", "exit_status", "marked"),
    [
        (PREEMPTED, True, PREEMPTED, True),
        (INTERRUPTED, True, INTERRUPTED, False),
        (0, True, PREEMPTED, True),
        (PREEMPTED, False, 0, False),
    ],
    ids=["sigterm", "ctrl-c", "signal on another rank", "not rank 0"],
)
def test_a_stop_has_an_exit_status_and_preemption_a_file(
    tmp_path: Path, status: int, is_rank0: bool, exit_status: int, marked: bool
) -> None:
    assert run_folder.stopped(tmp_path, status, is_rank0) == exit_status
    assert (tmp_path / "preempted").exists() == marked


def test_a_process_that_is_preempted_before_training_leaves_the_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), run_folder.preemptible(tmp_path):
        raise SystemExit(PREEMPTED)
    assert (tmp_path / "preempted").exists()
    with run_folder.preemptible(tmp_path):
        assert not (tmp_path / "preempted").exists(), "it is from before"
    with pytest.raises(SystemExit), run_folder.preemptible(tmp_path):
        raise SystemExit(1)
    assert not (tmp_path / "preempted").exists()
