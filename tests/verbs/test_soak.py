"""Thousands of steps with everything that happens to a run: what they leave behind is nothing."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import pytest

import model
from pipeline import FOR_ANY_STORE, LoaderOptions, barlow_twins, open_loader, open_store
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, Command, at_step, ctrl_c, read_summary

pytestmark = pytest.mark.slow

STEPS, BATCH, IMAGES = 5000, 16, 96


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def flat(readings: list[float]) -> bool:
    """Within 5% of the first, at the end and (leaks that are freed now and then) all along."""
    print("RSS in MB:", *(f"{reading:.1f}" for reading in readings))
    return abs(readings[-1] / readings[0] - 1) < 0.05 and max(readings) < 1.05 * readings[0]


def held() -> dict[str, object]:
    """Threads of ours, threads of the system's (with those of libraries), open files, child processes."""
    gc.collect()
    children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "files": sorted(
            os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
        ),
        "children": "".join(children).split(),
    }


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_thousands_of_steps_of_a_loader_leave_nothing_behind(tmp_path: Path, decoder: str) -> None:
    """Left in mid-epoch, closed or just dropped; begun again at any step; images turning bad, and good again."""
    store = open_store(write_photos(tmp_path, IMAGES))
    loader = open_loader(
        store, barlow_twins(24), LoaderOptions(batch_size=BATCH, threads=2, decoder=decoder)
    )
    rng, done, readings, before, bad = random.Random(0), 0, [], {}, set()
    while done < STEPS:
        path = Path(store.name(rng.randrange(IMAGES)))
        whole = path.with_suffix(".whole")
        if whole.exists():
            whole.replace(path)
        elif len(bad) < IMAGES // 4:
            path.rename(whole)
            path.write_bytes(whole.read_bytes()[: rng.choice((0, 10, -200))])
            bad.add(path)
        if rng.random() < 0.3:  # a new run, which knows of no bad image
            loader = open_loader(
                store, barlow_twins(24), LoaderOptions(batch_size=BATCH, threads=2, decoder=decoder)
            )
        first, leave_after = rng.randrange(60), rng.choice((0, 1, 3, 40, 200))
        batches = loader.steps(first, first + rng.choice((5, 50, 150)))
        for taken, batch in enumerate(batches):
            assert len(batch.samples.unique()) == BATCH
            done += 1
            if taken == leave_after:
                break
        if rng.random() < 0.5:
            batches.close()
        del batches
        if (
            done >= (len(readings) + 1) * STEPS // 10
        ):  # the first after a tenth: by then all is warm
            before = before or held()
            readings.append(resident_mb())
    assert flat(readings)
    assert held() == before
    assert before["threads"] == ["MainThread"]


def test_hundreds_of_steps_of_a_run_need_no_more_memory_than_the_first(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[float] = []
    before, schedule = held(), model.learning_rate_factor

    def measured(step: int, *rest: int, **named: float) -> float:
        if step % 100 == 99:
            readings.append(resident_mb())
        return schedule(step, *rest, **named)

    monkeypatch.setattr(model, "learning_rate_factor", measured)
    at_step(monkeypatch, 333, ctrl_c)
    options = ["--epochs", "120", "--log-steps", "1", "--checkpoint-minutes", "0", "--threads", "2"]
    for expected, resumed in ((130, []), (0, ["--resume"])):
        status, text = train(
            "--data", write_photos(tmp_path / "photos", 40, classes=1), *TINY, *options, *resumed
        )
        assert status == expected, text
    assert read_summary(Path("runs/demo"))["steps"] == 600
    assert len(readings) == 6
    assert flat(readings)
    after = held()
    assert {name: after[name] for name in ("threads", "files", "children")} == {
        name: before[name] for name in ("threads", "files", "children")
    }
