"""Images that the tests make, a cache folder of their own, and train.py run in this process."""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: tests run threads of both kinds at once
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton: without a GPU its kernels are interpreted


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test run, for its subprocesses as well."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TWINFEED_CACHE"] = str(folder)
    return folder


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, as photographs have: neither flat nor pure noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 24) + 1, max(1, width // 24) + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 JPEGs of different sizes in three classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), 60)


def write_photos(root: Path, count: int, classes: int = 3) -> Path:
    rng = np.random.default_rng(count)
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 120, 2)
        path.write_bytes(encoded(picture(int(width), int(height), seed=i), quality=90))
    return root


def needed(module: str) -> Any:
    """That module, or a skipped test where it is missing; a failed one where everything has to be installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it thinks of the libraries that it imports
            return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("TWINFEED_CI"):
            pytest.fail(f"{module} cannot be imported: {error}")
        pytest.skip(f"needs {module}: {error}")


@pytest.fixture
def ffcv() -> Iterator[Any]:
    """The library, without what its loaders do to torch's threads, here and in the threads of the tests to come."""
    import torch

    threads = torch.get_num_threads()
    yield needed("ffcv")
    gc.collect()  # its loaders lie in circles; here warnings about them are expected
    torch.set_num_threads(threads)


def as_records(store: Any, folder: Path) -> Any:
    """The images of a store in the plainest record files there could be: one after the other, in two files."""
    from pipeline.stores.index import ROW
    from pipeline.stores.records import RecordStore

    rows, files = np.zeros(len(store), ROW), [folder / "0.records", folder / "1.records"]
    for name in ("label", "height", "width"):
        rows[name] = store.index[name]
    contents = [b"", b""]
    for i, data in enumerate(store.read_batch(np.arange(len(store)))):
        file = i // -(-len(store) // 2)
        rows["file"][i], rows["offset"][i], rows["bytes"][i] = file, len(contents[file]), len(data)
        contents[file] += data
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    return RecordStore(folder, files, rows, store.classes)


def decoder_of(name: str, store: Any, recipe: Any, threads: int = 2) -> Any:
    import torch

    from pipeline.decoders import open_decoder

    return open_decoder(name, store, recipe, threads, torch.device("cpu"), 0.65)


TRAIN = Path(__file__).parent.parent / "train.py"
TINY = ["--device", "cpu", "--size", "16", "--width", "8", "--projector", "32-32-32", "--batch-size", "8"]
SUMMARY = [
    *("preset", "device", "decoder", "backbone", "steps", "images_per_s", "data_wait_fraction"),
    *("loss_first", "loss_last"),
    *("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained"),
    *("checkpoint", "export"),
]

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def run_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Train]:
    """A verb, by its name, in this process, from an empty folder: (exit status, everything it said)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)

    def run(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        status: Any = 0
        try:
            runpy.run_path(str(TRAIN.with_name(f"{name}.py")), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        text = said.out + said.err + (f"{status}\n" if isinstance(status, str) else "")
        assert "Traceback" not in text
        return 1 if isinstance(status, str) else status, text

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
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


CPU = ["--device", "cpu"]


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
            pixels = np.asarray(picture(40 + i % 7, 36 + i % 5, seed=1000 * (split == "val") + i)).copy()
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


def result_of(name: str) -> dict[str, Any]:
    return json.loads((Path("out") / f"{name}.json").read_text())


def outputs() -> set[str]:
    return {path.name for path in Path("out").iterdir()} if Path("out").exists() else set()


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs without labels: five steps of eight an epoch."""
    folder = tmp_path_factory.mktemp("flat")
    write_photos(folder, 40, classes=1)
    return folder


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def weights_of(run: Path) -> dict[str, Any]:
    import torch

    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one: Path, other: Path) -> bool:
    import torch

    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of a step of the next run."""
    import model

    schedule, done = model.learning_rate_factor, []

    def factor(now: int, *rest: Any, **named: Any) -> float:
        if now == step and not done:
            done.append(action())
        return schedule(now, *rest, **named)

    monkeypatch.setattr(model, "learning_rate_factor", factor)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def refused(result: tuple[int, str], *words: str) -> None:
    """A non-zero exit status, and one line that names what is wrong and what to do."""
    status, text = result
    assert status not in (0, 130), text
    lines = text.strip().splitlines()
    (error,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert error == len(lines) - 1, text
    assert not [word for word in words if word not in lines[-1]], text


# ── record formats ───────────────────────────────────────────────────────────────────────────────────────────────────

JPEGS = [encoded(picture(20 + 3 * i, 40 - 2 * i, seed=i), quality=60 + 3 * i) for i in range(9)]
LABELS = [3, -1, 0, 1000, 7, 7, -1, 12, 999_999]


def write_records(path: Path, format: Any, images: Sequence[bytes] = JPEGS, labels: Sequence[int] = LABELS) -> Path:
    """What convert.py does: some of JPEGS, in one file."""
    with path.open("wb") as file:
        file.write(format.begin(len(images)))
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            width, height = Image.open(io.BytesIO(image)).size
            before, after = format.frame(file.tell(), key, f"a/{key}.jpg", label, height, width, image, 0)
            file.write(before + image + after)
        format.finish(file, np.zeros(0))
    return path


def opened(path: Path, format: Any) -> Any:
    return format.open(path, lambda done, total: None)


def images_of(store: Any) -> list[bytes]:
    return store.read_batch(np.arange(len(store)))


def check_mutations(file: Path, format: Any, count: int = 100) -> None:
    """Bits turned, cut, and spliced: a ValueError, or samples; and beside the file nothing but its sidecar."""
    rng, good, refused = np.random.default_rng(5), file.read_bytes(), 0
    file.unlink()
    for number in range(count):
        data = bytearray(good)
        a, b, length = (int(x) for x in rng.integers(0, len(good), 3))
        if number % 3 == 0:
            for at in rng.integers(0, len(good), 1 + number // 6):
                data[at] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del data[a:]
        else:
            data[a : a + length % 2000] = good[b : b + length % 3000]
        bad = file.with_name(f"{number}{file.suffix}")
        bad.write_bytes(data)
        try:
            store = opened(bad, format)
        except ValueError as error:
            assert str(bad) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(isinstance(image, bytes) for image in images_of(store))
            assert all(store.name(i) for i in range(len(store)))
    assert count // 4 < refused
    assert {path.suffix for path in file.parent.iterdir()} <= {file.suffix, ".idx"}


# ── torch files ──────────────────────────────────────────────────────────────────────────────────────────────────────

TORCH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, program: bytes, zipped: bool = True) -> Path:
    """A torch file whose pickle is this one."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", b"3\n")
        return path
    head = saved(path, None, zipped=False).read_bytes()
    none, no_keys = pickle.dumps(None, protocol=2), pickle.dumps([], protocol=2)
    assert head.endswith(none + no_keys)
    path.write_bytes(head[: -len(none + no_keys)] + program + no_keys)
    return path
