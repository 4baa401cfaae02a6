"""Fixtures for all tests: folders of images, a cache folder, and the commands in this process."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.libraries import import_or_skip
from tests.helpers.runs import CPU, TINY, TRAIN, Command

# Before torch is imported: tests run the threads of torch and of Numba in turn, and threads that
# spin while they wait would take the cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before Triton is imported: without a GPU its kernels are interpreted.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test run, for its subprocesses as well."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TWINFEED_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def usual_torch_threads() -> int | None:
    """The number of threads that torch uses; None if no test imports torch."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


@pytest.fixture(autouse=True)
def restore_torch_threads(usual_torch_threads: int | None) -> Iterator[None]:
    """Undo what a test does to torch's threads: FFCV sets their number, which affects rounding."""
    yield
    if usual_torch_threads is not None:
        sys.modules["torch"].set_num_threads(usual_torch_threads)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 JPEGs of different sizes in three classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), 60)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 JPEGs without labels: five steps per epoch with batches of eight."""
    return write_photos(tmp_path_factory.mktemp("unlabelled"), 40, classes=1)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour: 60 images in train/ and 30 in val/."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 60), ("val", 30)):
        for i in range(count):
            path = root / split / f"class{i % 3}" / f"{split}_{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = picture(40 + i % 7, 36 + i % 5, seed=1000 * (split == "val") + i)
            pixels = np.asarray(image).copy()
            pixels[..., i % 3] //= 4  # each class has little of one of red, green and blue
            path.write_bytes(encoded(Image.fromarray(pixels), quality=90))
    return root


@pytest.fixture(scope="session")
def pretrained(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: one epoch of pretraining on `labelled`."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    options = ["--data", str(labelled), "--epochs", "1", *TINY, "--run-folder", str(folder)]
    command = [sys.executable, str(TRAIN), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return folder


@pytest.fixture
def common(pretrained: Path, labelled: Path) -> list[Any]:
    """Options of evaluate.py: the network, the images, and the folder `out` for the results."""
    return ["--checkpoint", pretrained, "--train", labelled, "--output", "out", *CPU]


@pytest.fixture
def ffcv() -> Iterator[Any]:
    """The library FFCV."""
    yield import_or_skip("ffcv")
    gc.collect()  # its loaders are reference cycles; warnings about them must come in this test


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs a command by its name in this process, from an empty folder.

    Returns the exit status and everything that was printed.
    """
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)

    def run(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        # A shell ignores Ctrl-C in the processes that it runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status: Any = 0
        try:
            runpy.run_path(str(TRAIN.with_name(f"{name}.py")), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        text = printed.out + printed.err
        if isinstance(status, str):  # sys.exit(message) prints it, and exits with 1
            text += f"{status}\n"
            status = 1
        assert "Traceback" not in text
        return status, text

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(run_command: Command) -> Command:
    """Runs `train.py` in this process, from an empty folder."""
    return partial(run_command, "train")


@pytest.fixture
def convert(run_command: Command) -> Command:
    """Runs `convert.py` in this process, from an empty folder."""
    return partial(run_command, "convert")


@pytest.fixture
def evaluate(run_command: Command) -> Command:
    """Runs `evaluate.py` in this process, from an empty folder."""
    return partial(run_command, "evaluate")
