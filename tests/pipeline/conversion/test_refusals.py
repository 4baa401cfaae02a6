"""Conversions that are refused, and what they must not touch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import ConversionOptions, ConversionProgress, verify_store, write_store
from tests.helpers.conversions import convert_to, files_in
from tests.helpers.images import encoded, picture


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lmdb"}, "choose one of beton, webdataset, tfrecord"),
        ({}, r"y is not known from its name: choose one of"),
        ({"format": "beton"}, r"y will be one file of the format beton: call it y\.beton"),
        (
            {"format": "tfrecord", "quality": 0},
            "--quality is 0: it must be at least 1 and at most 100",
        ),
        (
            {"format": "tfrecord", "quality": 101},
            "--quality is 101: it must be at least 1 and at most 100",
        ),
        ({"format": "tfrecord", "max_side": 0}, "--max-side is 0"),
        ({"format": "tfrecord", "short_side": 0}, "--short-side is 0"),
        ({"format": "tfrecord", "shards": 0}, "--shards is 0"),
        ({"format": "tfrecord", "shard_size": 0}, "--shard-size is 0"),
        ({"format": "tfrecord", "threads": 0}, "--threads is 0"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_store(photos, tmp_path / "y", ConversionOptions(**options))
    assert not list(tmp_path.iterdir())


def test_same_conversion_again_does_nothing(photos: Path, tmp_path: Path) -> None:
    assert convert_to(photos, tmp_path, "beton").new
    before = files_in(tmp_path)
    assert not convert_to(photos, tmp_path, "beton").new
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"quality": 80}, {"max_side": 20}, {"validate": False}], ids=str
)
def test_target_of_other_options_is_refused(
    photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    convert_to(photos, tmp_path, "beton")
    before = files_in(tmp_path)
    (name,) = options
    message = rf"x\.beton already exists, and was made .* with other options \({name} "
    with pytest.raises(ValueError, match=message):
        convert_to(photos, tmp_path, "beton", **options)
    assert files_in(tmp_path) == before


def test_target_that_is_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"was not made by convert\.py: move it"):
        convert_to(photos, tmp_path, "beton")
    assert files_in(tmp_path) == {"x.beton": b"mine"}


def test_file_beside_the_target_that_is_something_else_is_kept(
    photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text('{"annotations": []}')
    message = r"x\.json already exists, and was not made by convert\.py: move it"
    with pytest.raises(ValueError, match=message):
        convert_to(photos, tmp_path, "webdataset")
    assert files_in(tmp_path) == {"x.json": b'{"annotations": []}'}


def test_link_that_leads_nowhere_is_refused_as_a_target(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("unmounted")
    with pytest.raises(ValueError, match="already exists"):
        convert_to(photos, tmp_path, "webdataset")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_source_is_refused_as_a_target(photos: Path, tmp_path: Path) -> None:
    """The user must not be asked to delete it."""
    convert_to(photos, tmp_path, "beton")
    beton = tmp_path / "x.beton"
    with pytest.raises(ValueError, match="is the source: choose another target"):
        write_store(beton, beton)
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(ValueError, match="is the source: choose another target"):
        write_store(photos, tmp_path / "link", ConversionOptions(format="webdataset"))


def test_other_images_of_the_same_names_and_sizes_are_another_conversion(
    photos: Path, tmp_path: Path
) -> None:
    convert_to(photos, tmp_path, "beton")
    shutil.copytree(photos, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"other options \(source .* instead of .*copy\)"):
        convert_to(tmp_path / "copy", tmp_path, "beton")

    bitmaps = [(encoded(picture(20, 20, seed=i), "BMP"), None) for i in range(6)]
    assert convert_to(bitmaps, tmp_path, "tfrecord").new
    assert not convert_to(bitmaps, tmp_path, "tfrecord").new
    with pytest.raises(ValueError, match=r"other options \(identity"):
        convert_to(bitmaps[::-1], tmp_path, "tfrecord")
    assert not list(tmp_path.glob("*.partial"))


def test_two_conversions_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    def interfere(done: ConversionProgress, images: int) -> None:
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert_to(photos, tmp_path, "webdataset")

    convert_to(photos, tmp_path, "webdataset", progress=interfere)
    assert verify_store(tmp_path / "x", photos) == []


def test_strict_stops_at_the_first_bad_image(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "source")
    (tmp_path / "source" / "class1" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class1/bad\.jpg: it is not a JPEG, PNG, WebP or BMP"):
        convert_to(tmp_path / "source", tmp_path, "tfrecord", strict=True)
    assert not (tmp_path / "x").exists()


def test_strict_stops_at_rows_without_an_image(tmp_path: Path) -> None:
    images = [(encoded(picture(20, 20)), 0), (b"", 1)]
    with pytest.raises(ValueError, match="image 1: it is empty"):
        convert_to(images, tmp_path, "beton", strict=True)


def test_source_without_a_good_image_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(b"no image")
    message = r"none of the 1 images can be used; the first, a\.jpg: it is not a JPEG"
    with pytest.raises(ValueError, match=message):
        convert_to(tmp_path / "source", tmp_path, "beton")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
