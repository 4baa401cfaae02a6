"""Fixtures for the tests of runs that fail."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.images import write_photos
from tests.helpers.runs import TRAIN
from tests.helpers.torchrun import Torchrun, torchrun_in


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Ends a test that takes longer than a minute."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("a test of faults hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """The same 40 images for each test, which may change them."""
    return write_photos(tmp_path / "photos", 40, classes=1)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with `faults.OPTIONS` on the images of `own_photos`, without a fault."""
    from tests.helpers.faults import OPTIONS

    folder = tmp_path_factory.mktemp("uninterrupted")
    photos = write_photos(folder / "photos", 40, classes=1)
    options = ["--data", str(photos), *OPTIONS, "--run-folder", str(folder / "run")]
    command = [sys.executable, str(TRAIN), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


@pytest.fixture
def torchrun(tmp_path: Path) -> Torchrun:
    """Runs train.py on two ranks, from the empty folder `torchrun`."""
    return torchrun_in(tmp_path)
