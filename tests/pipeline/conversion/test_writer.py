"""Conversions: what comes out of them, that they can be killed at any point, and that they lose nothing."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image, JpegImagePlugin
from pyarrow import parquet

from pipeline import (
    FORMATS,
    ConversionOptions,
    ConversionProgress,
    ConversionResult,
    open_store,
    verify_store,
    write_store,
)
from pipeline.conversion import shard_writer, writer
from pipeline.conversion.jpeg_encoding import as_jpeg, check
from pipeline.formats.index import read_description
from pipeline.images import BadImage, decode
from tests.helpers.images import encoded, picture, write_photos
from tests.pipeline.test_images import BAD, by_pillow
from tests.pipeline.test_images import FORMATS as IMAGES

TARGETS = {"beton": "x.beton", "webdataset": "x", "tfrecord": "x"}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the formats of images that can be used, and all that cannot, in two classes."""
    root = tmp_path_factory.mktemp("odd")
    for folder, images in (
        ("good", IMAGES),
        ("bad", {name: data for name, (data, _) in BAD.items() if data}),
    ):
        (root / folder).mkdir()
        for name, data in images.items():
            (root / folder / f"{name}.{'jpg' if 'jpeg' in name else 'png'}").write_bytes(data)
    return root


def convert(source: Any, folder: Path, format: str, **options: Any) -> ConversionResult:
    elsewhere = {name: options.pop(name) for name in ("executor", "progress") if name in options}
    return write_store(
        source, folder / TARGETS[format], ConversionOptions(format=format, **options), **elsewhere
    )


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def all_of(path: Path) -> list[bytes]:
    store = open_store(path)
    return store.read_batch(np.arange(len(store)))


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_plain_jpegs_pass_through_others_become_jpegs_and_bad_ones_are_left_out(
    odd: Path, tmp_path: Path, format: str
) -> None:
    report = convert(odd, tmp_path, format)
    path = tmp_path / TARGETS[format]
    store, written = open_store(path), set(all_of(path))
    assert (
        report.images == len(store) == len(IMAGES) + 1
    )  # one of the bad has only another size than is claimed
    assert store.classes == ["bad", "good"]
    assert np.bincount(store.index["label"]).tolist() == [1, len(IMAGES)]
    plain = {
        name for name in IMAGES if "jpeg" in name and "cmyk" not in name and "4:4:1" not in name
    }
    for name, data in IMAGES.items():
        assert (data in written) == (name in plain), name
    assert report.done["passed through"] == len(plain) + 1
    assert sum(report.done.values()) == report.images
    assert verify_store(path, odd) == []

    lines = [
        json.loads(line)
        for line in (tmp_path / f"{TARGETS[format]}.rejects.jsonl").read_text().splitlines()
    ]
    assert len(lines) == report.rejects == sum(1 for data, _ in BAD.values() if data) - 1
    for line in lines:
        name = Path(line["name"]).stem
        assert line["reason"].strip()
        assert BAD[name][1].strip(".") in line["reason"], name
    account = json.loads((tmp_path / f"{TARGETS[format]}.json").read_text())
    assert account["images"] == len(store)
    assert account["plan"]["seed"] == 0
    assert set(account["versions"]) >= {"simplejpeg", "pillow"}


def apart(jpeg: bytes, image: Image.Image) -> float:
    """Mean difference, in levels of 255, from what Pillow makes of an image with the same settings."""
    reference = encoded(
        image, quality=96, subsampling=JpegImagePlugin.get_sampling(Image.open(io.BytesIO(jpeg)))
    )
    return float(
        np.abs(
            np.asarray(by_pillow(jpeg), dtype=int) - np.asarray(by_pillow(reference), dtype=int)
        ).mean()
    )


def test_what_is_encoded_again_is_what_pillow_makes_of_it() -> None:
    for name, data in IMAGES.items():
        jpeg = as_jpeg(data, None, None, None, validate=True)
        with Image.open(io.BytesIO(jpeg.data)) as image:
            assert image.mode in ("RGB", "L")
        if jpeg.done != "passed through":
            assert apart(jpeg.data, by_pillow(data)) < 0.5, (
                name
            )  # colours of 16 bits are rounded otherwise
            assert (
                np.abs(
                    np.asarray(by_pillow(jpeg.data), dtype=int) - np.asarray(by_pillow(data))
                ).mean()
                < 6
            ), name


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (500, 20), (90, 90)])
@pytest.mark.parametrize(
    ("max_side", "short_side"), [(100, None), (None, 100), (200, 100), (1000, 1000)]
)
def test_sides_are_bounded_and_the_rest_is_untouched(
    shape: tuple[int, int], max_side: int | None, short_side: int | None
) -> None:
    width, height = shape
    data = encoded(picture(width, height), quality=90)
    jpeg = as_jpeg(data, max_side, short_side, None, validate=True)
    factor = min(1, (max_side or 10**6) / max(shape), (short_side or 10**6) / min(shape))
    if factor == 1:
        assert jpeg == (data, height, width, "passed through")
        return
    assert jpeg.done == "resized"
    assert abs(jpeg.width - width * factor) <= 0.5
    assert abs(jpeg.height - height * factor) <= 0.5
    assert (
        apart(
            jpeg.data, by_pillow(data).resize((jpeg.width, jpeg.height), Image.Resampling.BICUBIC)
        )
        < 1.6
    )


def test_what_is_too_wide_for_a_jpeg_is_left_out_or_shrunk(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for side in (65_500, 65_501, 65_536):
        (tmp_path / "source" / f"{side}.png").write_bytes(encoded(picture(side, 2), "PNG"))
    for format in FORMATS:
        assert convert(tmp_path / "source", tmp_path, format).rejects == 2
        rejects = (tmp_path / f"{TARGETS[format]}.rejects.jsonl").read_text()
        assert "65501 x 2 pixels: a JPEG has at most 65,500 on a side; try --max-side" in rejects
        assert verify_store(tmp_path / TARGETS[format], tmp_path / "source") == []
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert (
        write_store(
            tmp_path / "source", tmp_path / "y.beton", ConversionOptions(max_side=65_500)
        ).rejects
        == 0
    )


def test_quality_only_touches_what_has_more() -> None:
    for quality in (30, 75, 90, 91, 95, 100):
        data = encoded(picture(60, 50), quality=quality)
        jpeg = as_jpeg(data, None, None, 90, validate=True)
        assert (jpeg.data == data) == (quality <= 90)
        with (
            Image.open(io.BytesIO(jpeg.data)) as image,
            Image.open(io.BytesIO(encoded(picture(9, 9), quality=90))) as standard,
        ):
            if quality > 90:
                assert image.quantization == standard.quantization
                assert jpeg.done == "encoded with less quality"


def mutated(seed: int, data: bytes) -> bytes:
    rng, changed = np.random.default_rng(seed), bytearray(data)
    kind = seed % 4
    if kind == 0:
        del changed[int(rng.integers(2, len(data))) :]
    elif kind == 1:
        first = int(rng.integers(2, len(data)))
        del changed[first : first + int(rng.integers(1, 200))]
    else:
        for at in rng.integers(2, len(data), 1 if kind == 2 else 20):
            changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_eighth_of_the_size_finds_the_flaws_that_the_whole_has() -> None:
    names, verdicts = [name for name in IMAGES if "jpeg" in name], []
    for seed in range(600):
        data = mutated(seed, IMAGES[names[seed % len(names)]])
        outcomes = []
        for examine in (decode, check):
            try:
                examine(data, 30, 41)
                outcomes.append("")
            except BadImage as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        verdicts.append(not outcomes[0])
        try:
            jpeg = as_jpeg(data, None, None, None, validate=True)
        except BadImage:
            continue
        check(jpeg.data, jpeg.height, jpeg.width)
        assert jpeg.done != "passed through" or jpeg.data == data
    assert 0.1 < np.mean(verdicts) < 0.9


@pytest.mark.parametrize("format", FORMATS)
def test_the_order_is_a_seeded_shuffle_of_all(photos: Path, tmp_path: Path, format: str) -> None:
    originals = {path.read_bytes(): path.parent.name for path in photos.rglob("*.jpg")}
    orders = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        convert(photos, tmp_path, format, seed=seed, shards=3, threads=1 + seed)
        orders.append(everything(tmp_path))
        store, images = open_store(tmp_path / TARGETS[format]), all_of(tmp_path / TARGETS[format])
        assert sorted(images) == sorted(originals)
        assert [store.classes[label] for label in store.index["label"]] == [
            originals[image] for image in images
        ]
        labels = store.index["label"]
        assert (np.diff(labels) != 0).mean() > 0.4  # sorted by class, two of 59 would change
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_shards_by_number_and_by_size(photos: Path, tmp_path: Path) -> None:
    for options, expected in (
        ({"shards": 7}, 7),
        ({"shard_size": 25}, 3),
        ({}, 1),
        ({"shards": 999}, 60),
    ):
        convert(photos, tmp_path, "webdataset", **options)
        store = open_store(tmp_path / "x")
        assert len(list((tmp_path / "x").glob("*.tar"))) == expected
        sizes = np.bincount(store.index["file"])
        assert sizes.max() - sizes.min() <= 1
        assert sum(sizes) == 60
        shutil.rmtree(tmp_path / "x")


def test_images_from_python(tmp_path: Path) -> None:
    images = [encoded(picture(20 + i, 30, seed=i)) for i in range(10)]
    for labels, classes in (
        ([i % 3 for i in range(10)], ["0", "1", "2"]),
        (["cat" if i % 2 else "dog" for i in range(10)], ["cat", "dog"]),
        ([None] * 10, []),
    ):
        report = write_store(zip(images, labels, strict=True), tmp_path / "x.beton")
        store = open_store(tmp_path / "x.beton")
        assert store.classes == classes
        assert report.images == 10
        named = {
            (image, store.classes[row["label"]] if classes else None)
            for image, row in zip(all_of(tmp_path / "x.beton"), store.index, strict=True)
        }
        assert named == {
            (image, None if label is None else str(label))
            for image, label in zip(images, labels, strict=True)
        }
        (tmp_path / "x.beton").unlink()


@pytest.mark.parametrize("format", ["webdataset", "tfrecord"])
def test_an_executor_writes_the_same_bytes(photos: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    convert(photos, tmp_path / "a", format, shards=5)
    with ThreadPoolExecutor(2) as executor:
        convert(photos, tmp_path / "b", format, shards=5, executor=executor)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """killer(k): the k-th change to a file from now on is done by half, and then all ends."""
    real = {name: getattr(os, name) for name in ("writev", "replace")}
    left = [-1]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def writev(fd: int, parts: list[bytes]) -> int:
        if due():
            whole = b"".join(parts)
            os.write(fd, whole[: len(whole) // 2])
            raise Killed
        return real["writev"](fd, parts)

    def replace(*paths: Any) -> None:
        if due():
            raise Killed
        real["replace"](*paths)

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "replace", replace)

    def arm(k: int) -> None:
        left[0] = k

    return arm


@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(
    tmp_path: Path, format: str, killer: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_photos(tmp_path / "source", 24)
    (source / "class0" / "bad.jpg").write_bytes(b"no image")
    monkeypatch.setattr(
        shard_writer, "_TOGETHER", 8000
    )  # a few images a chunk, so that there are many places to die at
    (tmp_path / "whole").mkdir()
    convert(source, tmp_path / "whole", format, shards=2)
    expected = everything(tmp_path / "whole")
    for k in range(1, 1000):
        folder = tmp_path / "killed"
        folder.mkdir()
        killer(k)
        try:
            convert(source, folder, format, shards=2)
            killer(-1)
            break
        except Killed:
            killer(-1)
        convert(source, folder, format, shards=2)
        assert everything(folder) == expected, k
        shutil.rmtree(folder)
    assert k > 15


@pytest.mark.parametrize("format", FORMATS)
def test_what_the_disk_lost_of_a_killed_conversion_is_written_again(
    photos: Path,
    tmp_path: Path,
    format: str,
    killer: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A power failure may take the end of a file, though the journal tells of it."""
    monkeypatch.setattr(shard_writer, "_TOGETHER", 8000)
    (tmp_path / "whole").mkdir()
    convert(photos, tmp_path / "whole", format)
    (tmp_path / "torn").mkdir()
    killer(25)
    with pytest.raises(Killed):
        convert(photos, tmp_path / "torn", format)
    killer(-1)
    (growing,) = (tmp_path / "torn").rglob("*.growing")
    data = bytearray(growing.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    growing.write_bytes(data)
    convert(photos, tmp_path / "torn", format)
    assert everything(tmp_path / "torn") == everything(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", ["before", "after", "rejects"])
def test_what_the_disk_lost_around_an_image_is_written_again(
    tmp_path: Path,
    format: str,
    part: str,
    killer: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_photos(tmp_path / "source", 40)
    for i in range(30):
        (source / "class0" / f"bad{i}.jpg").write_bytes(b"no image")
    monkeypatch.setattr(shard_writer, "_TOGETHER", 8000)
    (tmp_path / "whole").mkdir()
    (tmp_path / "torn").mkdir()
    convert(source, tmp_path / "whole", format)
    killer(25)
    with pytest.raises(Killed):
        convert(source, tmp_path / "torn", format)
    killer(-1)
    (growing,) = (tmp_path / "torn").rglob("*.growing")
    row = [row for row in shard_writer.read_journal(growing.with_suffix(".rows")) if row["bytes"]][
        3
    ]
    start, image_end = (
        row["offset"] - (20 if format == "tfrecord" else 300),
        int(row["offset"] + row["bytes"]),
    )
    if part == "rejects":
        (lines,) = (tmp_path / "torn").rglob("*.rejects.jsonl")
        assert lines.read_bytes().count(b"\n") > 3
        lines.write_bytes(lines.read_bytes().splitlines(keepends=True)[0])
    else:
        lost = slice(image_end, int(row["end"])) if part == "after" else slice(start, row["offset"])
        data = bytearray(growing.read_bytes())
        data[lost] = bytes(len(data[lost]))
        growing.write_bytes(data)
    convert(source, tmp_path / "torn", format)
    assert everything(tmp_path / "torn") == everything(tmp_path / "whole")


def test_a_shard_that_a_worker_still_writes_is_left_to_it(
    photos: Path, tmp_path: Path, killer: Callable[[int], None]
) -> None:
    killer(2)
    with pytest.raises(Killed):
        convert(photos, tmp_path, "webdataset")
    killer(-1)
    (growing,) = tmp_path.rglob("*.growing")
    with open(growing, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"shard-00000\.tar is being written"):
            convert(photos, tmp_path, "webdataset")
    assert convert(photos, tmp_path, "webdataset").images == 60


def test_large_images_do_not_fill_the_memory_before_their_size_is_known(tmp_path: Path) -> None:
    """On 16 cores, 33 chunks are under way."""

    class Counting:
        read_bytes = 0

        def read(self, number: int) -> bytes:
            self.read_bytes += 20 << 20
            return encoded(picture(20, 20)) + bytes(20 << 20)

    plan = shard_writer.Plan("", "", 1000, "beton", 1, 0, None, None, None, False)
    source: Any = Counting()
    with ThreadPoolExecutor(2) as pool:
        next(shard_writer._prepared(plan, source, plan.order(), pool, 33))
    assert source.read_bytes <= 34 * 20 << 20


# ── what can go wrong ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_loses_nothing_and_is_no_end(
    photos: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.beton").write_bytes(b"precious")
    real, room = os.writev, [60_000]

    def writev(fd: int, parts: list[bytes]) -> int:
        whole = b"".join(parts)[: room[0]]
        if not whole:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(whole)
        return os.write(fd, whole)

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(OSError, match="No space left") as full:
        convert(photos, tmp_path, format)
    assert full.value.__notes__ == ["once that is set right, the same command goes on"]
    assert not (tmp_path / TARGETS[format]).exists()
    monkeypatch.setattr(os, "writev", real)
    convert(photos, tmp_path, format)
    assert verify_store(tmp_path / TARGETS[format], photos) == []
    assert (tmp_path / "other.beton").read_bytes() == b"precious"


def test_the_same_again_is_nothing_to_do_and_another_is_refused(
    photos: Path, tmp_path: Path
) -> None:
    assert convert(photos, tmp_path, "beton").new
    before = everything(tmp_path)
    assert not convert(photos, tmp_path, "beton").new
    for options in ({"seed": 1}, {"quality": 80}, {"max_side": 20}, {"validate": False}):
        with pytest.raises(
            ValueError, match=rf"x\.beton is there already, made otherwise \({next(iter(options))}"
        ):
            convert(photos, tmp_path, "beton", **options)
    assert everything(tmp_path) == before
    (tmp_path / "y.beton").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not made by this program"):
        write_store(photos, tmp_path / "y.beton")
    assert (tmp_path / "y.beton").read_bytes() == b"mine"


def test_two_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    def interfere(written: ConversionProgress, images: int) -> None:
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert(photos, tmp_path, "webdataset")

    convert(photos, tmp_path, "webdataset", progress=interfere)
    assert verify_store(tmp_path / "x", photos) == []


def test_a_source_that_changed_in_between_is_refused(
    tmp_path: Path, killer: Callable[[int], None]
) -> None:
    source = write_photos(tmp_path / "source", 12)
    killer(4)
    with pytest.raises(Killed):
        convert(source, tmp_path, "beton")
    killer(-1)
    (source / "class0" / "new.jpg").write_bytes(encoded(picture(30, 30)))
    with pytest.raises(
        ValueError,
        match=r"begun otherwise \(identity .*images 12 instead of 13\): finish it, or delete",
    ):
        convert(source, tmp_path, "beton")
    shutil.rmtree(tmp_path / "x.beton.partial")
    assert convert(source, tmp_path, "beton").images == 13


def test_strict_ends_at_the_first_bad_image(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "source")
    (tmp_path / "source" / "class1" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class1/bad\.jpg: it is no JPEG, PNG, WebP or BMP"):
        convert(tmp_path / "source", tmp_path, "tfrecord", strict=True)
    assert not (tmp_path / "x").exists()


def test_a_source_without_a_good_image_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"none of the 1 images can be used; the first, a\.jpg: it is no JPEG"
    ):
        convert(tmp_path / "source", tmp_path, "beton")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "lmdb"}, "choose one of beton, webdataset, tfrecord"),
        ({"format": "beton"}, r"y is one file of the format beton: call it y\.beton"),
        (
            {"format": "tfrecord", "quality": 0},
            "the quality: 0, but it must be at least 1 and at most 100",
        ),
        ({"format": "tfrecord", "max_side": 0}, "the longer side: 0"),
        ({"format": "tfrecord", "shards": 0}, "shards: 0"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        write_store(photos, tmp_path / "y", ConversionOptions(**options))
    assert not list(tmp_path.iterdir())


def test_what_is_beside_a_target_and_not_ours_stays(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"annotations": []}')
    with pytest.raises(
        ValueError, match=r"x\.json is there already, not made by this program: move it"
    ):
        convert(photos, tmp_path, "webdataset")
    assert everything(tmp_path) == {"x.json": b'{"annotations": []}'}


def test_nobody_is_told_to_delete_the_source(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path, "beton")
    (tmp_path / "link").symlink_to(photos)
    for source, target in ((tmp_path / "x.beton",) * 2, (photos, tmp_path / "link")):
        with pytest.raises(ValueError, match="is the source: name another target"):
            write_store(
                source, target, ConversionOptions(format="beton" if target.suffix else "webdataset")
            )


def test_other_images_of_the_same_names_and_sizes_are_not_there_already(
    photos: Path, tmp_path: Path
) -> None:
    convert(photos, tmp_path, "beton")
    shutil.copytree(photos, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"made otherwise \(source .* instead of .*copy\)"):
        convert(tmp_path / "copy", tmp_path, "beton")
    bitmaps = [(encoded(picture(20, 20, seed=i), "BMP"), None) for i in range(6)]
    assert convert(bitmaps, tmp_path, "tfrecord").new
    assert not convert(bitmaps, tmp_path, "tfrecord").new
    with pytest.raises(ValueError, match=r"made otherwise \(identity"):
        convert(bitmaps[::-1], tmp_path, "tfrecord")
    assert not list(tmp_path.glob("*.partial"))


def test_strict_is_about_what_holds_no_image_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image 1: it is empty"):
        convert([(encoded(picture(20, 20)), 0), (b"", 1)], tmp_path, "beton", strict=True)


def test_more_than_an_index_can_tell_of_is_left_out(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 3)
    os.truncate(source / "class1" / "0001.jpg", 1 << 31)
    assert convert(source, tmp_path, "beton").rejects == 1
    assert "2,147,483,648 bytes" in (tmp_path / "x.beton.rejects.jsonl").read_text()


def test_whoever_waited_for_a_lock_that_is_gone_has_none(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it, the other conversion was done, and a third began."""
    real, partial = fcntl.flock, tmp_path / "x.beton.partial"

    def flock(*arguments: Any) -> None:
        shutil.rmtree(partial)
        partial.mkdir()
        (partial / "lock").touch()
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="another conversion is writing"):
        convert(photos, tmp_path, "beton")
    assert (partial / "lock").exists()


def test_a_kill_leaves_nothing_beside_the_target(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        if "index.npz" in Path(old).name:
            raise Killed
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        convert(photos, tmp_path, "beton")
    assert [path.name for path in tmp_path.iterdir()] == ["x.beton.partial"]


def test_a_worker_that_lives_on_sees_that_the_source_has_changed(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 6)
    with ThreadPoolExecutor(1) as executor:
        for images in (6, 7):
            assert convert(source, tmp_path, "webdataset", executor=executor).images == images
            (source / "class0" / "new.jpg").write_bytes(encoded(picture(20, 20)))
            shutil.rmtree(tmp_path / "x")


def test_workers_use_the_spool_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = pyarrow.table({"image": [encoded(picture(20 + i, 20)) for i in range(8)]})
    for name in "ab":
        parquet.write_table(table, f"{name}.parquet")
    real, made = writer.open_source, set()  # type: ignore[attr-defined]

    def opened(spec: str, progress: Any, scratch: Path) -> Any:
        source = real(spec, progress, scratch)
        made.add((scratch / "spool").stat().st_mtime_ns)
        return source

    monkeypatch.setattr(writer, "open_source", opened)
    with ThreadPoolExecutor(1) as executor:
        assert convert("*.parquet", tmp_path, "webdataset", executor=executor).images == 16
    assert len(made) == 1


def test_what_only_looks_like_a_file_is_left_out_and_not_waited_for(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 6)
    os.mkfifo(source / "class0" / "pipe.jpg")
    (source / "class1" / "endless.jpg").symlink_to("/dev/zero")
    report = convert(source, tmp_path, "beton")
    assert (report.images, report.rejects) == (6, 2)
    store = open_store(source)
    assert set(store.rejects.values()) == {"it is a pipe or a device, not a file"}
    assert len(store) == 6


def test_a_link_to_what_is_not_there_is_no_target(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("unmounted")
    with pytest.raises(ValueError, match="is there already"):
        convert(photos, tmp_path, "webdataset")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_leaves_no_half_written_index(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    killer: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A killed conversion and the one that goes on are two processes."""
    photos = write_photos(tmp_path_factory.mktemp("source"), 6)
    convert(photos, tmp_path, "beton")
    expected = everything(tmp_path)
    for k in range(2, 100):
        for path in tmp_path.iterdir():
            path.unlink()
        killer(k)
        try:
            convert(photos, tmp_path, "beton")
            break
        except Killed:
            killer(-1)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            convert(photos, tmp_path, "beton")
        assert everything(tmp_path) == expected, k
    killer(-1)
    assert k > 6


def test_a_damaged_plan_of_work_in_progress_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x.beton.partial").mkdir()
    (tmp_path / "x.beton.partial" / "plan.json").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"plan\.json is damaged .*: delete .*x\.beton\.partial, and begin again"
    ):
        convert(photos, tmp_path, "beton")


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", FORMATS)
def test_verify_finds_a_flipped_bit_anywhere_in_the_images(
    photos: Path, tmp_path: Path, format: str
) -> None:
    convert(photos, tmp_path, format)
    path = tmp_path / TARGETS[format]
    store = open_store(path)
    row = store.index[17]
    file = store.files[row["file"]]
    with open(file, "r+b") as opened:
        opened.seek(int(row["offset"]) + int(row["bytes"]) // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 4]))
    problems = verify_store(path)
    assert any("it is not what was written" in problem for problem in problems)
    assert any(store.name(17) in problem for problem in problems)


def test_verify_against_the_source_finds_what_changed_there(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 12)
    bad = source / "class0" / "bad.jpg"
    bad.write_bytes(b"no image")
    convert(source, tmp_path, "webdataset")
    assert verify_store(tmp_path / "x", source) == []
    changed, broken = source / "class1" / "0001.jpg", source / "class1" / "0004.jpg"
    changed.write_bytes(encoded(picture(50, 50)))
    broken.write_bytes(broken.read_bytes()[:100])
    bad.write_bytes(encoded(picture(50, 50)))
    problems = "\n".join(verify_store(tmp_path / "x", source))
    assert "class1/0001.jpg gives another image now" in problems
    assert "class1/0004.jpg gave it, which is bad now: truncated" in problems
    assert "class0/bad.jpg was left out, but is good now" in problems
    assert problems.count("\n") == 2
    changed.unlink()
    assert "holds 12 images that are not the 13" in verify_store(tmp_path / "x", source)[0]
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match=r"no x\.json"):
        verify_store(tmp_path / "x", source)


def test_verify_finds_a_changed_label_and_another_version(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path, "webdataset")
    (file,) = (tmp_path / "x").glob("*.tar")
    data = bytearray(file.read_bytes())
    data[data.index(b".cls") // 512 * 512 + 512] ^= 1
    file.write_bytes(data)
    assert verify_store(tmp_path / "x") == [f"{file} has other labels than its index"]
    account = read_description(tmp_path / "x")
    account["plan"]["rotation"] = 90
    (tmp_path / "x.json").write_text(json.dumps(account))
    with pytest.raises(ValueError, match=r"x\.json is of another version of convert\.py.*rotation"):
        verify_store(tmp_path / "x", photos)
    with pytest.raises(ValueError, match="rotation 90 instead of None"):
        convert(photos, tmp_path, "webdataset")


def test_a_missing_and_an_exchanged_shard_are_named(photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path, "webdataset", shards=3)
    lost = tmp_path / "x" / "shard-00001.tar"
    data = lost.read_bytes()
    lost.unlink()
    for door in (open_store, verify_store):
        with pytest.raises(ValueError, match=r"x lacks shard-00001\.tar; restore"):
            door(tmp_path / "x")
    lost.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"shard-00001\.tar has \d+ bytes instead of"):
        open_store(tmp_path / "x")
    lost.write_bytes(data)
    assert read_description(tmp_path / "x")["images"] == 60
    assert verify_store(tmp_path / "x", photos) == []


def test_verify_compares_labels_that_other_readers_see(photos: Path, tmp_path: Path) -> None:
    """A .cls has no checksum."""
    convert(photos, tmp_path, "webdataset")
    shard = tmp_path / "x" / "shard-00000.tar"
    data = shard.read_bytes()
    at = data.index(b".cls") // 512 * 512 + 512
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (problem,) = verify_store(tmp_path / "x")
    assert "other labels than its index" in problem


def test_verify_against_a_damaged_account(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    (source / "class0" / "bad.jpg").write_bytes(b"no image")
    convert(source, tmp_path, "beton")
    account, rejects = tmp_path / "x.beton.json", tmp_path / "x.beton.rejects.jsonl"
    for file, old, new in (
        (account, '"seed"', '"sead"'),
        (rejects, '"source"', '"sourca"'),
        (rejects, '"source": ', '"source": 99'),
        (rejects, "{", ""),
    ):
        good = file.read_text()
        file.write_text(good.replace(old, new))
        with pytest.raises(
            ValueError,
            match=r"x\.beton\.json (or .* is damaged .*: restore it|is of another version)",
        ):
            verify_store(tmp_path / "x.beton", source)
        file.write_text(good)
    account.write_text(account.read_text().replace('"class1"', '"klass1"', 1))
    assert (
        "names other classes than the source: class0"
        in verify_store(tmp_path / "x.beton", source)[0]
    )
    account.write_text(
        account.read_text().replace('"klass1"', '"class1"').replace('"bytes"', '"bites"')
    )
    with pytest.raises(ValueError, match=r"x\.beton\.json is damaged \(it lacks 'bytes'\)"):
        convert(source, tmp_path, "beton")
