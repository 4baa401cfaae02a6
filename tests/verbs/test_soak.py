"""A loader or a run holds no more memory, threads and files after thousands of steps."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import model
from pipeline import (
    FOR_ANY_STORE,
    Loader,
    LoaderOptions,
    Store,
    barlow_twins,
    open_loader,
    open_store,
)
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, Command, at_step, ctrl_c, read_summary

pytestmark = pytest.mark.slow

STEPS = 5000
BATCH = 16
IMAGES = 96


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def is_constant(readings: list[float]) -> bool:
    """Whether the last reading is within 5% of the first, and none is more than 5% above it.

    The second condition finds leaks that are freed now and then.
    """
    print("resident MB:", *(f"{reading:.1f}" for reading in readings))
    return abs(readings[-1] / readings[0] - 1) < 0.05 and max(readings) < 1.05 * readings[0]


def resources() -> dict[str, object]:
    """Python's threads, all threads (with those of libraries), open files and child processes."""
    gc.collect()
    children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    files = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "all threads": len(os.listdir("/proc/self/task")),
        "files": sorted(os.readlink(path) for path in files),
        "children": "".join(children).split(),
    }


def damage_or_restore(path: Path, rng: random.Random, damaged: set[Path]) -> None:
    """Damage an image, if not too many have been damaged yet; restore it if it is damaged."""
    backup = path.with_suffix(".backup")
    if backup.exists():
        backup.replace(path)
    elif len(damaged) < IMAGES // 4:
        path.rename(backup)
        path.write_bytes(backup.read_bytes()[: rng.choice((0, 10, -200))])
        damaged.add(path)


def open_small_loader(store: Store, decoder: str) -> Loader:
    options = LoaderOptions(batch_size=BATCH, threads=2, decoder=decoder)
    return open_loader(store, barlow_twins(24), options)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_a_loader_leaks_nothing_in_thousands_of_steps(tmp_path: Path, decoder: str) -> None:
    """Its iterators are started at any step, and dropped or closed early; images turn bad."""
    store = open_store(write_photos(tmp_path, IMAGES))
    loader = open_small_loader(store, decoder)
    rng = random.Random(0)
    damaged: set[Path] = set()
    before: dict[str, object] = {}
    readings: list[float] = []
    steps = 0
    while steps < STEPS:
        damage_or_restore(Path(store.name(rng.randrange(IMAGES))), rng, damaged)
        if rng.random() < 0.3:
            loader = open_small_loader(store, decoder)  # which does not know any bad image
        first = rng.randrange(60)
        leave_after = rng.choice((0, 1, 3, 40, 200))
        batches = loader.steps(first, first + rng.choice((5, 50, 150)))
        for taken, batch in enumerate(batches):
            assert len(batch.samples.unique()) == BATCH
            steps += 1
            if taken == leave_after:
                break
        if rng.random() < 0.5:
            batches.close()
        del batches

        # The first reading is after a tenth of the steps, when all caches are filled.
        if steps >= (len(readings) + 1) * STEPS // 10:
            if not readings:
                before = resources()
            readings.append(resident_mb())
    assert is_constant(readings)
    assert resources() == before
    assert before["threads"] == ["MainThread"]


def test_a_run_leaks_nothing_in_hundreds_of_steps(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[float] = []
    before = resources()
    learning_rate_factor = model.learning_rate_factor

    def patched(step: int, *arguments: Any, **options: Any) -> float:
        if step % 100 == 99:
            readings.append(resident_mb())
        return learning_rate_factor(step, *arguments, **options)

    monkeypatch.setattr(model, "learning_rate_factor", patched)
    at_step(monkeypatch, 333, ctrl_c)
    photos = write_photos(tmp_path / "photos", 40, classes=1)
    options = ["--data", photos, *TINY, "--epochs", "120", "--threads", "2"]
    options += ["--log-steps", "1", "--checkpoint-minutes", "0"]
    for expected_status, resume in ((130, []), (0, ["--resume"])):
        status, text = train(*options, *resume)
        assert status == expected_status, text
    assert read_summary(Path("runs/demo"))["steps"] == 600
    assert len(readings) == 6
    assert is_constant(readings)
    after = resources()
    for name in ("threads", "files", "children"):
        assert after[name] == before[name]
