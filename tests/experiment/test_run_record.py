"""Reading the folder of a run: its status, its metrics, and files that are missing or damaged."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from experiment.run_record import read_run
from tests.helpers.run_records import healthy_line, write_run


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """The folder of a run that ended after 50 of its 200 steps."""
    return write_run(tmp_path / "run", [healthy_line(step) for step in range(50)])


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a run.*config\.json.*train\.py"):
        read_run(tmp_path)


def test_a_run_that_ended_early_is_stopped(half_done: Path) -> None:
    assert read_run(half_done).status() == (
        "stopped",
        "at step 50 of 200; --resume continues from the last checkpoint",
    )


def test_a_run_whose_folder_is_locked_is_running(half_done: Path) -> None:
    lines = [healthy_line(step) | {"images_per_s": 1.0} for step in range(50)]
    write_run(half_done, lines)
    with (half_done / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # 150 steps of 64 images at 1 image/s are 9600 s.
        assert read_run(half_done).status() == ("running", "at step 50 of 200, 2 h 40 min left")
    assert read_run(half_done).status().name == "stopped"


def test_a_run_that_a_signal_has_stopped_is_preempted(half_done: Path) -> None:
    (half_done / "preempted").touch()
    status = read_run(half_done).status()
    assert status.name == "preempted"
    assert "--resume" in status.progress


def test_a_run_with_a_summary_is_finished(half_done: Path) -> None:
    (half_done / "summary.json").write_text(json.dumps({"steps": 1200}))
    assert read_run(half_done).status() == ("finished", "after 1,200 steps")


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "loss": None},
        {"step": 0, "loss": 4.0, "lr": 0.5},
        {"step": 1, "warning": "late"},
    ]
    run = read_run(write_run(tmp_path, lines))
    assert run.points("loss") == [(0, 4.0), (2, None)]
    assert run.points("lr", factor=10) == [(0, 5.0), (2, None)]
    assert run.values("loss") == [4.0]


def test_damaged_files_count_as_missing(half_done: Path) -> None:
    (half_done / "environment.json").write_text('{"torch": "2.')
    (half_done / "summary.json").write_text("[1]")
    with (half_done / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n"step"\n{"loss": 3}\n{"step": 200, "warning": "torn at a }')
    run = read_run(half_done)
    assert (run.environment, run.summary) == ({}, {})
    assert [row["step"] for row in run.rows] == list(range(50))
