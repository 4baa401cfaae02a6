"""Images that the tests make, a cache folder of their own, and train.py run in this process."""

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
from tests.helpers.libraries import needed
from tests.helpers.runs import CPU, TINY, TRAIN, Train

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: tests run threads of both kinds at once
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton: without a GPU its kernels are interpreted


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test run, for its subprocesses as well."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TWINFEED_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 JPEGs of different sizes in three classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), 60)


@pytest.fixture
def ffcv() -> Iterator[Any]:
    """The library, without what its loaders do to torch's threads, here and in the threads of the tests to come."""
    import torch

    threads = torch.get_num_threads()
    yield needed("ffcv")
    gc.collect()  # its loaders lie in circles; here warnings about them are expected
    torch.set_num_threads(threads)


@pytest.fixture
def run_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Train]:
    """A verb, by its name, in this process, from an empty folder: (exit status, everything it said)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)

    def run(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored where the tests run in the background
        status: Any = 0
        try:
            runpy.run_path(str(TRAIN.with_name(f"{name}.py")), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        text = said.out + said.err + (f"{status}\n" if isinstance(status, str) else "")
        assert "Traceback" not in text
        return 1 if isinstance(status, str) else status, text

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(run_verb: Train) -> Train:
    """`train.py` in this process, from an empty folder: (exit status, everything it said)."""
    return partial(run_verb, "train")


@pytest.fixture
def convert(run_verb: Train) -> Train:
    """`convert.py`, likewise."""
    return partial(run_verb, "convert")


@pytest.fixture
def evaluate(run_verb: Train) -> Train:
    """`evaluate.py`, likewise."""
    return partial(run_verb, "evaluate")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that colour tells apart: 60 images to learn from, 30 to be asked about."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 60), ("val", 30)):
        for i in range(count):
            path = root / split / f"class{i % 3}" / f"{split}_{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(
                picture(40 + i % 7, 36 + i % 5, seed=1000 * (split == "val") + i)
            ).copy()
            pixels[..., i % 3] //= 4  # of one of red, green and blue there is little
            path.write_bytes(encoded(Image.fromarray(pixels), quality=90))
    return root


@pytest.fixture(scope="session")
def pretrained(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a pretraining of an epoch on those."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    command = [sys.executable, TRAIN, "--data", labelled, "--epochs", "1", *TINY, "--run", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return folder


@pytest.fixture
def common(pretrained: Path, labelled: Path) -> list[Any]:
    """Options of an evaluation, whose results come into `out`."""
    return ["--checkpoint", pretrained, "--train", labelled, "--output", "out", *CPU]


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs without labels: five steps of eight an epoch."""
    folder = tmp_path_factory.mktemp("flat")
    write_photos(folder, 40, classes=1)
    return folder


# ── record formats ───────────────────────────────────────────────────────────────────────────────────────────────────


# ── torch files ──────────────────────────────────────────────────────────────────────────────────────────────────────
