"""Conversions: which images are written, left out or re-encoded, in which order and files."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline import (
    FORMATS,
    ConversionOptions,
    open_store,
    verify_store,
    write_store,
)
from pipeline.conversion.plan import Plan
from pipeline.conversion.prepare import prepare_chunks
from tests.helpers.conversions import TARGETS, convert_to, files_in, images_of
from tests.helpers.images import BAD_IMAGES, EXAMPLE_IMAGES, encoded, picture, write_photos


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds that can be used, and of all kinds that cannot, in two classes."""
    root = tmp_path_factory.mktemp("examples")
    bad = {name: data for name, (data, _) in BAD_IMAGES.items() if data}
    for folder, images in (("good", EXAMPLE_IMAGES), ("bad", bad)):
        (root / folder).mkdir()
        for name, data in images.items():
            suffix = "jpg" if "jpeg" in name else "png"
            (root / folder / f"{name}.{suffix}").write_bytes(data)
    return root


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_standard_jpegs_pass_through_others_are_reencoded_and_bad_images_are_left_out(
    examples: Path, tmp_path: Path, format: str
) -> None:
    result = convert_to(examples, tmp_path, format)
    path = tmp_path / TARGETS[format]
    store = open_store(path)
    written = set(images_of(path))
    # One of the bad images is bad only for a store that expects another size.
    assert result.images == len(store) == len(EXAMPLE_IMAGES) + 1
    assert store.classes == ["bad", "good"]
    assert np.bincount(store.index["label"]).tolist() == [1, len(EXAMPLE_IMAGES)]
    standard = {
        name
        for name in EXAMPLE_IMAGES
        if "jpeg" in name and "cmyk" not in name and "4:4:1" not in name
    }
    for name, data in EXAMPLE_IMAGES.items():
        assert (data in written) == (name in standard), name
    assert result.treatments["passed through"] == len(standard) + 1
    assert sum(result.treatments.values()) == result.images
    assert verify_store(path, examples) == []

    text = (tmp_path / f"{TARGETS[format]}.rejects.jsonl").read_text()
    rejects = [json.loads(line) for line in text.splitlines()]
    assert len(rejects) == result.rejects == sum(1 for data, _ in BAD_IMAGES.values() if data) - 1
    for reject in rejects:
        name = Path(reject["name"]).stem
        assert reject["reason"].strip()
        assert BAD_IMAGES[name][1].strip(".") in reject["reason"], name
    description = json.loads((tmp_path / f"{TARGETS[format]}.json").read_text())
    assert description["images"] == len(store)
    assert description["plan"]["seed"] == 0
    assert set(description["versions"]) >= {"simplejpeg", "pillow"}


def test_images_too_wide_for_a_jpeg_are_left_out_or_resized(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for side in (65_500, 65_501, 65_536):
        (source / f"{side}.png").write_bytes(encoded(picture(side, 2), "PNG"))
    for format in FORMATS:
        assert convert_to(source, tmp_path, format).rejects == 2
        rejects = (tmp_path / f"{TARGETS[format]}.rejects.jsonl").read_text()
        assert "65501 x 2 pixels: a JPEG has at most 65,500 on a side; try --max-side" in rejects
        assert verify_store(tmp_path / TARGETS[format], source) == []
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
    options = ConversionOptions(max_side=65_500)
    assert write_store(source, tmp_path / "y.beton", options).rejects == 0


@pytest.mark.parametrize("format", FORMATS)
def test_order_is_a_seeded_shuffle_of_all_images(photos: Path, tmp_path: Path, format: str) -> None:
    originals = {path.read_bytes(): path.parent.name for path in photos.rglob("*.jpg")}
    written = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        convert_to(photos, tmp_path, format, seed=seed, shards=3, threads=1 + seed)
        written.append(files_in(tmp_path))
        store = open_store(tmp_path / TARGETS[format])
        images = images_of(tmp_path / TARGETS[format])
        labels = store.index["label"]
        assert sorted(images) == sorted(originals)
        assert [store.classes[label] for label in labels] == [originals[i] for i in images]
        assert (np.diff(labels) != 0).mean() > 0.4  # sorted by class, two of 59 would change
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize(
    ("options", "files"),
    [({}, 1), ({"shard_size": 25}, 3), ({"shards": 7}, 7), ({"shards": 999}, 60)],
)
def test_shards_are_as_many_as_asked_for_and_of_equal_size(
    photos: Path, tmp_path: Path, options: dict[str, int], files: int
) -> None:
    convert_to(photos, tmp_path, "webdataset", **options)
    store = open_store(tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.tar"))) == files
    sizes = np.bincount(store.index["file"])
    assert sizes.max() - sizes.min() <= 1
    assert sum(sizes) == 60


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([i % 3 for i in range(10)], ["0", "1", "2"]),
        (["cat" if i % 2 else "dog" for i in range(10)], ["cat", "dog"]),
        ([None] * 10, []),
    ],
    ids=["numbers", "names", "none"],
)
def test_images_from_python_are_converted_with_their_labels(
    tmp_path: Path, labels: list[Any], classes: list[str]
) -> None:
    images = [encoded(picture(20 + i, 30, seed=i)) for i in range(10)]
    result = write_store(zip(images, labels, strict=True), tmp_path / "x.beton")
    store = open_store(tmp_path / "x.beton")
    assert store.classes == classes
    assert result.images == 10
    written = {
        (image, classes[label] if classes else None)
        for image, label in zip(images_of(tmp_path / "x.beton"), store.index["label"], strict=True)
    }
    names = [None if label is None else str(label) for label in labels]
    assert written == set(zip(images, names, strict=True))


@pytest.mark.parametrize("format", ["webdataset", "tfrecord"])
def test_executor_writes_the_same_bytes(photos: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    convert_to(photos, tmp_path / "here", format, shards=5)
    with ThreadPoolExecutor(2) as executor:
        convert_to(photos, tmp_path / "there", format, shards=5, executor=executor)
    assert files_in(tmp_path / "here") == files_in(tmp_path / "there")


def test_executor_uses_the_staging_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = pyarrow.table({"image": [encoded(picture(20 + i, 20)) for i in range(8)]})
    for name in "ab":
        parquet.write_table(table, f"{name}.parquet")

    opened: list[str] = []
    parquet_file = parquet.ParquetFile

    def open_parquet(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return parquet_file(path, **options)

    monkeypatch.setattr(parquet, "ParquetFile", open_parquet)
    with ThreadPoolExecutor(1) as executor:
        assert convert_to("*.parquet", tmp_path, "webdataset", executor=executor).images == 16
    assert len(opened) == 2  # each of them once


def test_executor_that_lives_on_sees_that_the_source_has_changed(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 6)
    with ThreadPoolExecutor(1) as executor:
        for images in (6, 7):
            result = convert_to(source, tmp_path, "webdataset", executor=executor)
            assert result.images == images
            (source / "class0" / "new.jpg").write_bytes(encoded(picture(20, 20)))
            shutil.rmtree(tmp_path / "x")


def test_large_images_do_not_fill_the_memory_before_their_size_is_known() -> None:
    """On 16 cores, 33 chunks are prepared at a time."""

    class LargeImages:
        read_bytes = 0

        def read(self, number: int) -> bytes:
            self.read_bytes += 20 << 20
            return encoded(picture(20, 20)) + bytes(20 << 20)

    plan = Plan("", "", 1000, "beton", 1, 0, None, None, None, False)
    source: Any = LargeImages()
    with ThreadPoolExecutor(2) as pool:
        next(prepare_chunks(plan, source, plan.order(), pool, 33))
    assert source.read_bytes <= 34 * 20 << 20


def test_images_too_large_for_an_index_are_left_out(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 3)
    os.truncate(source / "class1" / "0001.jpg", 1 << 31)
    assert convert_to(source, tmp_path, "beton").rejects == 1
    assert "2,147,483,648 bytes" in (tmp_path / "x.beton.rejects.jsonl").read_text()


def test_pipes_and_devices_are_left_out_and_not_waited_for(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 6)
    os.mkfifo(source / "class0" / "pipe.jpg")
    (source / "class1" / "endless.jpg").symlink_to("/dev/zero")
    result = convert_to(source, tmp_path, "beton")
    assert (result.images, result.rejects) == (6, 2)
    store = open_store(source)
    assert set(store.rejects.values()) == {"it is a pipe or a device, not a file"}
    assert len(store) == 6
