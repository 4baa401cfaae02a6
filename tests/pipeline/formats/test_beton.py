"""Betons: what we write is read to the byte, and damaged tables are refused before any reading."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c

from pipeline import find_format, open_store
from pipeline.formats import EncodedSample, beton
from pipeline.formats.index import ROW, index_path, load_index, save_index, sidecar_path
from tests.helpers.betons import (
    ALLOCATION_BYTES,
    FIELD_BYTES,
    FIELDS_OFFSET,
    HEADER_BYTES,
    MIB,
    PAGE_OFFSET,
    SAMPLE_BYTES,
    SAMPLES_OFFSET,
    TABLE_OFFSET,
    VERSION_OFFSET,
    labelled_jpegs,
    write_beton,
)
from tests.helpers.records import images_of


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 12 samples, with room for five more."""
    return write_beton(tmp_path_factory.mktemp("beton") / "ours.beton", labelled_jpegs(12), 5)


def with_index(path: Path, change: Callable[[Any], None] = lambda rows: None) -> Path:
    """Write an index with checksums beside a beton, after `change` was applied to it."""
    store = open_store(path)
    rows = store.index.copy()
    rows["checksum"] = [crc32c(data) for data in images_of(store)]
    change(rows)
    save_index(index_path(path), [path], rows)
    return path


# Writing


def test_no_image_crosses_a_page_whatever_their_sizes() -> None:
    rng = np.random.default_rng(0)
    for largest in (100_000, 8 * MIB, 8 * MIB + 1, 40 * MIB):
        sizes = np.append(np.exp(rng.uniform(np.log(1), np.log(largest), 300)).astype(int), largest)
        rng.shuffle(sizes)
        rows = np.zeros(len(sizes), ROW)
        offset = len(beton.begin(len(sizes)))
        for row, size in zip(rows, sizes, strict=True):
            image: Any = range(size)  # only its length matters
            before, _ = beton.frame(offset, EncodedSample(0, "", 0, 1, 1, image, checksum=0))
            assert not any(before)
            row["offset"] = offset + len(before)
            row["bytes"] = size
            offset += len(before) + int(size)
        file = io.BytesIO()
        beton.finish(file, rows)
        page = struct.unpack_from("<I", file.getvalue(), PAGE_OFFSET)[0]
        assert page == max(8 * MIB, 1 << int(largest - 1).bit_length())
        assert np.array_equal(rows["offset"] // page, (rows["offset"] + rows["bytes"] - 1) // page)
        assert offset < 2 * sizes.sum() + 8 * MIB


def test_unused_room_and_padding_are_zero(ours: Path) -> None:
    data = bytearray(ours.read_bytes())
    rows = open_store(ours).index
    for row in rows:
        data[row["offset"] : row["offset"] + row["bytes"]] = bytes(int(row["bytes"]))
    assert len(data) == len(beton.begin(17)) + rows["bytes"].sum() + 12 * ALLOCATION_BYTES
    tables = HEADER_BYTES + 2 * FIELD_BYTES + 12 * SAMPLE_BYTES
    assert not any(data[tables : -12 * ALLOCATION_BYTES])


# Reading


def test_our_beton_is_read_to_the_byte(ours: Path) -> None:
    store = open_store(ours)
    assert find_format(ours) == "beton"
    assert list(zip(images_of(store), store.index["label"], strict=True)) == labelled_jpegs(12)
    assert store.classes == ["0", "1"]
    assert store.rejects == {}


def test_a_scan_lists_the_images_of_the_store(ours: Path) -> None:
    store = open_store(ours)
    scan = beton.scan(ours)
    rows = store.index[["offset", "bytes", "label"]].tolist()
    assert [tuple(image) for image in scan.images] == [
        (f"sample {i}", *row) for i, row in enumerate(rows)
    ]
    assert scan.rejects == {}
    assert scan.sidecar == ""
    assert not sidecar_path(ours).exists()


def test_an_index_adds_checksums_and_nothing_else(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "x.beton", labelled_jpegs(7))
    without_index = open_store(path)
    store = open_store(with_index(path))
    assert store.checksums
    assert not without_index.checksums
    assert store.index["checksum"].tolist() == [crc32c(data) for data in images_of(without_index)]
    fields = ["label", "offset"]
    assert np.array_equal(store.index[fields], without_index.index[fields])
    assert images_of(store) == images_of(without_index)


@pytest.mark.parametrize("field", ["label", "height", "width", "offset", "bytes"])
def test_an_index_that_disagrees_with_the_tables_is_refused(tmp_path: Path, field: str) -> None:
    def change(rows: Any) -> None:
        rows[field][3] -= 1 if field != "label" else -1

    path = with_index(write_beton(tmp_path / "x.beton", labelled_jpegs(7)), change)
    assert load_index(path, [path]) is not None
    message = r"x\.beton and .*x\.beton\.index\.npz do not agree: restore.*or delete"
    with pytest.raises(ValueError, match=message):
        open_store(path)


def test_labels_without_a_name_are_refused(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "x.beton", labelled_jpegs(6))
    description = tmp_path / "x.beton.json"
    description.write_text('{"classes": ["cat", "dog"]}')
    assert open_store(path).classes == ["cat", "dog"]
    description.write_text('{"classes": ["cat"]}')
    with pytest.raises(ValueError, match="label 1"):
        open_store(path)


def test_a_file_that_is_cut_while_in_use_reads_as_empty(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "x.beton", labelled_jpegs(6))
    store = open_store(path)
    with path.open("r+b") as file:
        file.truncate(int(store.index["offset"][3]) + 10)
    assert [bool(data) for data in images_of(store)] == [True] * 3 + [False] * 3


# Damaged tables


def overwrite(offset: int, kind: str, value: int) -> Callable[[bytearray], bytes]:
    """Damage that packs a number at an offset, which may count from the end."""

    def damage(data: bytearray) -> bytes:
        struct.pack_into("<" + kind, data, offset % len(data), value)
        return bytes(data)

    return damage


# Offsets in the entry of sample 0; three bytes of padding come before the label.
MODE = HEADER_BYTES + 2 * FIELD_BYTES
WIDTH = MODE + 1
ADDRESS = MODE + 5
LABEL = MODE + 16
LAST_SIZE = -ALLOCATION_BYTES + 16  # the size in the last allocation, that of sample 11

DAMAGE: dict[str, tuple[Callable[[bytearray], bytes], str]] = {
    "nothing": (lambda data: b"", "too short for the header"),
    "a header alone": (lambda data: bytes(data[:HEADER_BYTES]), "too short for 2 fields"),
    "text": (lambda data: b"<html>" * 100, "not a beton of version 2, but of 26684:"),
    "another version": (
        overwrite(VERSION_OFFSET, "H", 1),
        "not a beton of version 2, but of 1:",
    ),
    "no samples": (overwrite(SAMPLES_OFFSET, "Q", 0), "invalid header: 0 samples"),
    "odd pages": (overwrite(PAGE_OFFSET, "I", 3 * MIB), "in pages of 3145728 bytes"),
    "no fields": (overwrite(FIELDS_OFFSET, "H", 0), "no field of images"),
    "more fields than bytes": (
        overwrite(FIELDS_OFFSET, "H", 65_535),
        "too short for 65535 fields",
    ),
    "more samples than bytes": (
        overwrite(SAMPLES_OFFSET, "Q", 2**64 - 1),
        "too short for 18,446,744,073,709,551,615 samples",
    ),
    "more samples than before the table": (
        overwrite(SAMPLES_OFFSET, "Q", 1000),
        "too short for 1,000 samples",
    ),
    "no image field": (overwrite(HEADER_BYTES, "B", 1), "no field of images"),
    "a field of an unknown kind": (
        overwrite(HEADER_BYTES + FIELD_BYTES, "B", 255),
        "unknown FFCV type 255",
    ),
    "a table in the middle": (
        overwrite(TABLE_OFFSET, "Q", 3000),
        "truncated allocation table|invalid offset, size or mode",
    ),
    "a table in the header": (overwrite(TABLE_OFFSET, "Q", 100), "too short for 12 samples"),
    "a table after the end": (overwrite(TABLE_OFFSET, "Q", 2**63), "truncated allocation table"),
    "a table cut off": (lambda data: bytes(data[:-1]), "truncated allocation table"),
    "a table cut off at an entry": (
        lambda data: bytes(data[:-ALLOCATION_BYTES]),
        "image of sample 11 has an invalid offset, size or mode",
    ),
    "cut in half": (lambda data: bytes(data[: len(data) // 2]), "truncated allocation table"),
    "an unknown mode": (
        overwrite(MODE, "B", 2),
        "image of sample 0 has an invalid offset, size or mode",
    ),
    "raw pixels of another size": (
        overwrite(MODE, "B", 1),
        "image of sample 0 has an invalid offset, size or mode",
    ),
    "no width": (overwrite(WIDTH, "H", 0), "image of sample 0 has an invalid offset, size or mode"),
    "an address without an allocation": (
        overwrite(ADDRESS, "Q", 7777),
        "image of sample 0 has an invalid offset, size or mode",
    ),
    "a size beyond the data": (
        overwrite(LAST_SIZE, "Q", 100_000),
        "image of sample 11 has an invalid offset, size or mode",
    ),
    "a size that wraps around": (
        overwrite(LAST_SIZE, "Q", 2**64 - 8),
        "image of sample 11 has an invalid offset, size or mode",
    ),
    "no size": (
        overwrite(LAST_SIZE, "Q", 0),
        "image of sample 11 has an invalid offset, size or mode",
    ),
    "a label too small": (overwrite(LABEL, "q", -2), "the label -2"),
    "a label too large for int32": (overwrite(LABEL, "q", 2**31), "the label 2147483648"),
    "a label that would fill the memory": (overwrite(LABEL, "q", 2**30), "the label 1073741824"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_impossible_tables_are_refused_with_the_reason(
    tmp_path: Path, ours: Path, name: str
) -> None:
    damage, reason = DAMAGE[name]
    path = tmp_path / "x.beton"
    path.write_bytes(damage(bytearray(ours.read_bytes())))
    with pytest.raises(ValueError, match=reason) as error:
        open_store(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_image_within_the_tables_is_refused(tmp_path: Path, ours: Path) -> None:
    data = bytearray(ours.read_bytes())
    table = len(data) - 12 * ALLOCATION_BYTES
    for address in (0, HEADER_BYTES, table):
        struct.pack_into("<Q", data, ADDRESS, address)
        struct.pack_into("<Q", data, table + 8, address)
        (tmp_path / "x.beton").write_bytes(data)
        with pytest.raises(
            ValueError, match="image of sample 0 has an invalid offset, size or mode"
        ):
            open_store(tmp_path / "x.beton")


def test_random_damage_to_the_tables_is_refused_or_does_no_harm(tmp_path: Path, ours: Path) -> None:
    rng = np.random.default_rng(0)
    whole = ours.read_bytes()
    path = tmp_path / "x.beton"
    tables = [*range(HEADER_BYTES + 2), *range(MODE, MODE + 12 * SAMPLE_BYTES)]
    tables += range(len(whole) - 12 * ALLOCATION_BYTES, len(whole))
    opened = 0
    for i in range(200):
        data = bytearray(whole)
        for offset in rng.choice(tables, rng.integers(1, 4)):
            data[offset] ^= 1 << int(rng.integers(8))
        if i % 10 == 0:
            data = data[: int(rng.integers(len(data)))]
        path.write_bytes(data)
        try:
            store = open_store(path)
        except ValueError:
            continue
        opened += 1
        assert all(isinstance(image, bytes) for image in images_of(store))
    assert 10 < opened < 190


# Many images


def test_a_million_images_are_opened_in_two_seconds(tmp_path: Path) -> None:
    n = 1_300_000
    path = tmp_path / "x.beton"
    data_start = len(beton.begin(n))
    rows = np.zeros(n, ROW)
    rows["label"] = np.arange(n) % 1000
    rows["height"] = 1
    rows["width"] = 1
    rows["bytes"] = 16
    rows["offset"] = data_start + 16 * np.arange(n)
    images = np.arange(2 * n, dtype="<u8")
    with path.open("w+b") as file:
        file.write(bytes(data_start) + images.tobytes())
        beton.finish(file, rows)
    # Several workers of FFCV's writer would have left the table in some other order.
    shuffled = np.random.default_rng(0).permutation(n)
    with path.open("r+b") as file:
        file.seek(data_start + 16 * n)
        table = np.fromfile(file, "<u8").reshape(n, 3)
        file.seek(data_start + 16 * n)
        file.write(table[shuffled].tobytes())
    del table

    seconds = []
    for _ in range(2):  # the better of the two, as the machine may be busy
        began = time.perf_counter()
        store = open_store(path)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    assert len(store.classes) == 1000

    tracemalloc.start()
    open_store(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6

    began = time.perf_counter()
    for sample in shuffled[:1000]:
        expected = images[2 * sample : 2 * sample + 2].tobytes()
        assert store.read_batch(np.array([sample])) == [expected]
    assert (time.perf_counter() - began) / 1000 < 1e-3
