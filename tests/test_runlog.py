"""What a run shows and says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import (
    TRAIN,
)

import pipeline


def test_the_picture_shows_images_that_decode(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    store = pipeline.open_store(tmp_path / "data")
    recipe = pipeline.barlow_twins(32)
    whole = pipeline.view_picture(store, recipe)
    assert whole is not None
    assert whole.size == (8 * (96 + 4) + 4, 3 * (96 + 4) + 4)
    for sample in pipeline.loader.epoch_order(len(store), 0, 0)[3:]:
        Path(store.name(int(sample))).write_bytes(b"")
    three = pipeline.view_picture(store, recipe)
    assert three is not None
    assert three.width == 3 * (96 + 4) + 4
    for sample in range(len(store)):
        Path(store.name(sample)).write_bytes(b"")
    assert pipeline.view_picture(store, recipe) is None


def test_a_run_goes_on_when_nobody_reads_what_it_says() -> None:
    code = "import time, sys\nfrom runlog import RunLog\nwith RunLog() as log:\n"
    code += "    for i in range(50): log.say(str(i)); time.sleep(0.01)\n    print('trained', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=TRAIN.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read() == "trained\n"
    assert process.wait() == 0
