"""A run that is killed at any moment can be resumed, and ends with the same results to the bit."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import model
from experiment.metrics import read_metrics
from tests.helpers.fork_server import ForkServer, Run, fork_server
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, read_summary, same_weights

# Ten steps; a checkpoint is saved after each.
OPTIONS = [
    *("--data", "photos"),
    *TINY,
    *("--epochs", "2"),
    *("--lr", "6"),
    *("--threads", "1"),
    *("--log-steps", "1"),
    *("--checkpoint-minutes", "0"),
    *("--keep-checkpoints", "3"),
    *("--milestone-epochs", "1"),
    "--resume-if-saved",
]
# Files that exist only while a run saves a checkpoint, or its results at the end.
CHECKPOINT_FILES = [".checkpoint.pt.tmp"]
RESULT_FILES = [".backbone.safetensors.tmp", ".backbone.pth.tmp", "summary.json.tmp"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts train.py in a folder with 40 images.

    Two of them are bad. After a kill, they must be replaced by the same images as before.
    """
    folder = tmp_path_factory.mktemp("kills")
    photos = write_photos(folder / "photos", 40, classes=1)
    for path in sorted(photos.rglob("*.jpg"))[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    with fork_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(start: ForkServer) -> Path:
    """The folder of a run that was not killed."""
    run = start(*OPTIONS, "--run-folder", "uninterrupted")
    assert run.wait() == 0, run.text()
    return start.folder / "uninterrupted"


def wait_for(run: Run, files: list[Path], times: int) -> None:
    """Wait until one of the files has appeared so many times, or until the run has ended."""
    appeared = 0
    existed = False
    while appeared < times and run.is_running():
        exists = any(path.exists() for path in files)
        if exists and not existed:
            appeared += 1
        existed = exists
        time.sleep(0.0002)


def kill_at_random(run: Run, folder: Path, rng: random.Random, duration_s: float) -> None:
    """Kill a run at any time of its `duration_s`, or while it saves something."""
    moment = rng.choice(["any time", "saving a checkpoint", "saving results"])
    if moment == "any time":
        time.sleep(rng.uniform(0, duration_s))
    else:
        names = CHECKPOINT_FILES if moment == "saving a checkpoint" else RESULT_FILES
        wait_for(run, [folder / name for name in names], rng.randint(1, 4))
        time.sleep(rng.choice((0, rng.uniform(0, 0.02))))
    run.kill()


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none. A kill must not damage any."""
    if not any(folder.glob("checkpoint*.pt")):
        return 0
    with model.Checkpoints(folder) as checkpoints:
        state, passed_over = checkpoints.load()
    assert not passed_over
    return state["step"]


def assert_same_results(run: Path, uninterrupted: Path) -> None:
    """Check that two runs have written the same files, with the same contents where possible."""
    assert file_names(run) == file_names(uninterrupted), "the same checkpoints, no temporary files"
    losses = logged_losses(run)
    assert losses == logged_losses(uninterrupted), "each step once"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(losses)
    assert same_weights(run, uninterrupted)
    for path in run.glob("checkpoint-*.pt"):
        assert model.load_checkpoint(path)["step"] == int(path.stem[-8:])
    exported = uninterrupted / "backbone.safetensors"
    for path in [exported, *(uninterrupted / "correlation").iterdir()]:
        assert (run / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes(), path
    for name in ("steps", "loss_first", "loss_last"):
        assert read_summary(run)[name] == read_summary(uninterrupted)[name]


def file_names(run: Path) -> set[str]:
    """The files of a run, without TensorBoard's: a resumed run adds one to those."""
    paths = [path for path in run.rglob("*") if path.parent.name != "tensorboard"]
    return {str(path.relative_to(run)) for path in paths}


def logged_losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]


def remove_runs(start: ForkServer) -> None:
    for path in start.folder.glob("run*"):
        shutil.rmtree(path)


def check_random_kills(
    start: ForkServer, uninterrupted: Path, kills: int, slow_disk_s: float = 0
) -> None:
    """Kill and resume runs, one after the other, until so many have been killed."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    folder = start.folder / "run"
    duration_s = math.inf  # of the shortest run so far
    killed = 0
    saved = 0  # the newest checkpoint of the present run
    try:
        while killed < kills or saved:
            began = time.monotonic()
            run = start(*OPTIONS, "--run-folder", "run", slow_disk_s=slow_disk_s)
            if killed < kills and duration_s < math.inf:
                kill_at_random(run, folder, rng, duration_s)
            status = run.wait()
            assert status in (0, -signal.SIGKILL), run.text()

            resumed_at = saved
            saved = newest_step(folder)
            assert saved >= resumed_at, "a checkpoint was lost"
            if status != 0:
                killed += 1
                continue
            if resumed_at:
                assert f"resumed after step {resumed_at}" in run.text()
            assert_same_results(folder, uninterrupted)
            duration_s = min(duration_s, time.monotonic() - began)
            saved = 0
            remove_runs(start)
    except AssertionError as error:
        error.add_note(f"seed {seed}, after {killed} kills")
        raise


def test_a_run_killed_ten_times_ends_with_the_same_results(
    start: ForkServer, uninterrupted: Path
) -> None:
    check_random_kills(start, uninterrupted, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "slow_disk_s"), [(140, 0), (60, 0.03)])
def test_runs_killed_two_hundred_times_end_with_the_same_results(
    start: ForkServer, uninterrupted: Path, kills: int, slow_disk_s: float
) -> None:
    """With a slow disk, most kills come while the thread writes a checkpoint."""
    check_random_kills(start, uninterrupted, kills, slow_disk_s)


@pytest.mark.slow
def test_a_run_killed_before_any_change_of_its_folder_ends_with_the_same_results(
    start: ForkServer, uninterrupted: Path
) -> None:
    folder = start.folder / "run"
    saved = 0
    for nth in itertools.count(1):
        killed = start(*OPTIONS, "--run-folder", "run", killed_at=nth)
        status = killed.wait()
        assert status in (0, -signal.SIGKILL), killed.text()
        saved_by_earlier_kill = saved
        saved = newest_step(folder)
        assert saved >= saved_by_earlier_kill, f"killed before change {nth}, a checkpoint was lost"

        resumed = start(*OPTIONS, "--run-folder", "run")
        assert resumed.wait() == 0, f"{resumed.text()}, killed before change {nth}"
        if saved:
            assert f"resumed after step {saved}" in resumed.text()
        assert_same_results(folder, uninterrupted)
        remove_runs(start)
        if status == 0:
            break
    assert nth > 60
