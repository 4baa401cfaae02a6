"""Damaged files give decoded images, rejects with a reason, or one clear error; nothing else."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline import FORMATS, ConversionOptions, open_store, verify_store, write_store
from pipeline.images import BadImage, decode
from tests.helpers.images import EXAMPLE_IMAGES, encoded, picture

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
DATA_SUFFIXES = (".beton", ".tar", ".tfrecord", ".jpg", ".png")
LONGEST_S = 20  # for one file
MOST_BYTES = 600 << 20  # of memory, for all of them


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small data set in each format, with and without labels, and a folder of example images."""
    folder = tmp_path_factory.mktemp("originals")
    images = [encoded(picture(20 + i, 30, seed=i), quality=70) for i in range(10)]
    originals = {}
    for format in FORMATS:
        for labelled in (True, False):
            path = folder / f"{format}-{labelled}" / ("x.beton" if format == "beton" else "x")
            path.parent.mkdir()
            labels = [i % 2 if labelled else None for i in range(10)]
            write_store(
                zip(images, labels, strict=True), path, ConversionOptions(format=format, shards=2)
            )
            originals[f"{format}-{labelled}"] = path
    path = folder / "folder" / "x"
    (path / "a").mkdir(parents=True)
    for name, data in EXAMPLE_IMAGES.items():
        (path / "a" / f"{name}.{'jpg' if 'jpeg' in name else 'png'}").write_bytes(data)
    originals["folder"] = path
    return originals


def damage(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """A copy with flipped bits, cut off, or with a part removed, repeated, replaced or zeroed."""
    changed = bytearray(data)
    size = len(data)
    kind = rng.integers(9)
    at = int(rng.integers(max(1, size)))
    length = int(rng.integers(1, 2000))
    if kind < 3 and size:
        first, last = ((0, size), (0, min(size, 4000)), (max(0, size - 600), size))[kind]
        for i in rng.integers(first, last, int(rng.integers(1, 12))):
            changed[i] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del changed[at:]
    elif kind == 4:
        del changed[at : at + length]
    elif kind == 5:
        changed[at:at] = changed[at : at + length] * int(rng.integers(1, 4))
    elif kind == 6:
        start = int(rng.integers(max(1, len(other))))
        changed[at : at + length] = other[start : start + length]
    elif kind == 7:
        changed[at : at + length] = bytes(length)
    elif size >= 8:  # a number that is too large, or negative
        place = int(rng.integers(0, min(size - 7, 3000)))
        changed[place : place + 8] = int(rng.integers(-(2**63), 2**63 - 1)).to_bytes(
            8, "little", signed=True
        )
    return bytes(changed)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def use(path: Path, result: Path) -> str:
    """Open, read, convert and verify a data set, and return what came of it.

    Any error but the expected ones fails the test.
    """
    try:
        kinds = read(path)
    except (ValueError, OSError) as error:
        assert_clear(error)
        kinds = {"refused"}
    try:
        report = write_store(path, result, ConversionOptions(format="beton"))
        assert len(open_store(result)) == report.images
        assert verify_store(result) == []
        kinds.add("converted")
        rejects = result.with_name(result.name + ".rejects.jsonl")
        lines = rejects.read_text().splitlines() if rejects.exists() else []
        assert len(lines) == report.rejects
        assert all(json.loads(line)["reason"].strip() for line in lines)
    except (ValueError, OSError) as error:
        assert_clear(error)
        kinds.add("not converted")
    return ", ".join(sorted(kinds))


def read(path: Path) -> set[str]:
    store = open_store(path)
    kinds = set()
    for sample, row in enumerate(store.index):
        (data,) = store.read_batch(np.array([sample]))
        height = int(row["height"])
        width = int(row["width"])
        try:
            assert decode(data, height, width).shape[1:] == (height, width)
            kinds.add("decoded")
        except BadImage:
            kinds.add("bad")
    assert all(reason.strip() for reason in store.rejects.values())
    store.name(0)
    return kinds


def assert_clear(error: Exception) -> None:
    assert type(error) is not UnicodeDecodeError  # a ValueError, too
    assert len(str(error)) > 20, error
    assert "\n" not in str(error), error


def use_damaged_copies(
    originals: dict[str, Path], folder: Path, count: int, first: int = 0
) -> Counter[str]:
    """Damage one file of a copy and use it, `count` times; `first` is the first seed."""
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        name = list(originals)[seed % len(originals)]
        copy = folder / str(seed)
        shutil.copytree(originals[name].parent, copy)
        target = copy / originals[name].name
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        data = [path for path in files if path.suffix in DATA_SUFFIXES]
        if rng.random() < 0.6:  # as others write it, without index and description
            for path in set(files) - set(data):
                path.unlink()
            files = data
        victim, other = (files[int(rng.integers(len(files)))] for _ in range(2))
        victim.write_bytes(damage(victim.read_bytes(), rng, other.read_bytes()))
        outside = {path for path in folder.iterdir() if path != copy}
        with within(LONGEST_S):
            try:
                outcomes[use(target, copy / "result.beton")] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}: {victim.relative_to(copy)} of {name}")
                raise
        assert {path for path in folder.iterdir() if path != copy} == outside
        shutil.rmtree(copy)
    return outcomes


def check_outcomes(outcomes: Counter[str], count: int, memory_before: int) -> None:
    print(*outcomes.items(), sep="\n")
    assert sum(outcomes.values()) == count
    # All outcomes occur: the damage is neither too small nor too large.
    for kind in ("decoded", "bad", "refused", "converted", "not converted"):
        assert any(kind in names.split(", ") for names in outcomes), kind
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak - memory_before < MOST_BYTES


def test_three_hundred_damaged_files(originals: dict[str, Path], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    check_outcomes(use_damaged_copies(originals, tmp_path, 300), 300, before)


@pytest.mark.slow
def test_ten_thousand_damaged_files(originals: dict[str, Path], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes = use_damaged_copies(originals, tmp_path, 10_000, first=1000)
    check_outcomes(outcomes, 10_000, before)
