"""Killed at any moment, a run goes on from its last save and ends to the same bits."""

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

# Ten steps, each of which is saved.
OPTIONS = [
    "--data",
    "photos",
    *TINY,
    "--epochs",
    "2",
    "--lr",
    "6",
    "--threads",
    "1",
    "--log-steps",
    "1",
    "--checkpoint-minutes",
    "0",
]
OPTIONS += ["--keep-checkpoints", "3", "--milestone-epochs", "1", "--resume-if-saved"]
SAVING = [".checkpoint.pt.tmp"]
ENDING = [".backbone.safetensors.tmp", ".backbone.pth.tmp", "summary.json.tmp"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """train.py on forty photographs, two of which do not decode: the same must stand in for them after a kill."""
    folder = tmp_path_factory.mktemp("kills")
    for path in sorted(write_photos(folder / "photos", 40, classes=1).rglob("*.jpg"))[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    with fork_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def whole(start: ForkServer) -> Path:
    """A run that nothing interrupted."""
    run = start(*OPTIONS, "--run", "whole")
    assert run.wait() == 0, run.text()
    return start.folder / "whole"


def wait_for(run: Run, signs: list[Path], times: int) -> None:
    """Until one of the files has come into being for the nth time, or the run has ended."""
    there, seen = False, 0
    while seen < times and run.going_on():
        before, there = there, any(path.exists() for path in signs)
        seen += there and not before
        time.sleep(0.0002)


def kill_somewhere(run: Run, folder: Path, rng: random.Random, took_s: float) -> None:
    moment = rng.choice(["any time", "saving", "ending"])
    if moment == "any time":
        time.sleep(rng.uniform(0, took_s))
    else:
        signs = SAVING if moment == "saving" else ENDING
        wait_for(run, [folder / name for name in signs], rng.randint(1, 4))
        time.sleep(rng.choice((0, rng.uniform(0, 0.02))))
    run.kill()


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none. None is damaged by a kill."""
    if not any(folder.glob("checkpoint*.pt")):
        return 0
    with model.Checkpoints(folder) as checkpoints:
        state, passed_over = checkpoints.load()
    assert not passed_over
    return state["step"]


def check_same(run: Path, whole: Path) -> None:
    files = [
        {str(p.relative_to(r)) for p in r.rglob("*") if p.parent.name != "tensorboard"}
        for r in (run, whole)
    ]
    lines = [
        [(line["step"], line["loss"]) for line in read_metrics(r / "metrics.jsonl")]
        for r in (run, whole)
    ]
    assert files[0] == files[1], "as many checkpoints, nothing temporary"
    assert lines[0] == lines[1], "each step once"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines[0])
    assert same_weights(run, whole)
    for path in run.glob("checkpoint-*.pt"):
        assert model.load_checkpoint(path)["step"] == int(path.stem[-8:])
    for path in [whole / "backbone.safetensors", *(whole / "correlation").iterdir()]:
        assert (run / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    for name in ("steps", "loss_first", "loss_last"):
        assert read_summary(run)[name] == read_summary(whole)[name]


def check_kills(start: ForkServer, whole: Path, kills: int, slow_disk_s: float = 0) -> None:
    """Runs that are killed and go on, one after the other, until so many kills have come."""
    seed = random.randrange(1 << 32)
    rng, folder, took_s, done, saved = random.Random(seed), start.folder / "run", math.inf, 0, 0
    try:
        while done < kills or saved:
            began = time.monotonic()
            run = start(*OPTIONS, "--run", "run", slow_disk_s=slow_disk_s)
            if done < kills and took_s < math.inf:
                kill_somewhere(run, folder, rng, took_s)
            status = run.wait()
            assert status in (0, -signal.SIGKILL), run.text()
            before, saved = saved, newest(folder)
            assert saved >= before, "nothing that was saved is lost"
            done += status != 0
            if status == 0:
                assert not before or f"resumed after step {before}" in run.text()
                check_same(folder, whole)
                took_s, saved = min(took_s, time.monotonic() - began), 0
                for path in start.folder.glob("run*"):
                    shutil.rmtree(path)
    except AssertionError as error:
        error.add_note(f"seed {seed}, after {done} kills")
        raise


def test_a_run_killed_ten_times_ends_to_the_same_bits(start: ForkServer, whole: Path) -> None:
    check_kills(start, whole, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "slow_disk_s"), [(140, 0), (60, 0.03)])
def test_runs_killed_two_hundred_times_end_to_the_same_bits(
    start: ForkServer, whole: Path, kills: int, slow_disk_s: float
) -> None:
    """On a slow disk most kills come upon the thread that writes."""
    check_kills(start, whole, kills, slow_disk_s)


@pytest.mark.slow
def test_a_run_killed_between_any_two_changes_of_its_folder_ends_to_the_same_bits(
    start: ForkServer, whole: Path
) -> None:
    folder, saved = start.folder / "run", 0
    for nth in itertools.count(1):
        status = start(*OPTIONS, "--run", "run", killed_at=nth).wait()
        assert status in (0, -signal.SIGKILL)
        before, saved = saved, newest(folder)
        assert saved >= before, f"killed before its change {nth} it has lost what was saved"
        run = start(*OPTIONS, "--run", "run")
        assert run.wait() == 0, f"{run.text()}, killed before its change {nth}"
        assert not saved or f"resumed after step {saved}" in run.text()
        check_same(folder, whole)
        for path in start.folder.glob("run*"):
            shutil.rmtree(path)
        if status == 0:
            break
    assert nth > 60
