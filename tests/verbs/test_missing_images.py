"""Images that disappear during a run end it with one error; after they are restored, it resumes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.faults import FAULT_STEP, OPTIONS, assert_resume_is_exact, assert_saved
from tests.helpers.runs import TRAIN, Command, assert_refused, at_step, saved_step

pytestmark = pytest.mark.usefixtures("no_hang")


def test_a_folder_that_disappears_is_named_and_the_run_resumes_when_it_is_back(
    train: Command,
    own_photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    options = ("--data", own_photos, *OPTIONS, "--run-folder", run)
    elsewhere = tmp_path / "elsewhere"
    at_step(monkeypatch, FAULT_STEP, lambda: own_photos.rename(elsewhere))
    result = train(*options)
    step = assert_saved(result, run, f"the images in {own_photos} cannot be read", "No such file")
    assert FAULT_STEP < step <= FAULT_STEP + 6, "batches that were decoded before are used"
    assert "replaced" not in result[1], "the images are not bad"

    checkpoint = (run / "checkpoint.pt").read_bytes()
    assert_refused(train(*options, "--resume"), str(own_photos), "not there")
    assert (run / "checkpoint.pt").read_bytes() == checkpoint

    elsewhere.rename(own_photos)
    assert_resume_is_exact(train, own_photos, run, uninterrupted)


@pytest.mark.slow
def test_a_process_whose_images_disappear_prints_one_line(own_photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*OPTIONS, "--epochs", "4000", "--checkpoint-minutes", "0"]
    options += ["--data", str(own_photos), "--run-folder", str(run)]
    command = [sys.executable, str(TRAIN), *options]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            while process.poll() is None and not (run / "checkpoint.pt").exists():
                time.sleep(0.01)
            own_photos.rename(tmp_path / "elsewhere")
            assert process.wait(timeout=20) == 1
            (line,) = process.stderr.read().splitlines()
        finally:
            process.kill()
    assert line.startswith(
        f"error: the images in {own_photos} cannot be read: No such file or directory. "
    )
    assert line.endswith(
        f"the last checkpoint is step {saved_step(run)} in {run}/checkpoint.pt: "
        "continue with --resume"
    )
