"""verify_store finds what has changed in the data, in what is beside them, or in their source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline import FORMATS, open_store, verify_store
from pipeline.formats.index import read_description
from tests.helpers.conversions import TARGETS, convert_to
from tests.helpers.images import encoded, picture, write_photos


def flip_bits(path: Path, at: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bit_in_an_image_is_found(photos: Path, tmp_path: Path, format: str) -> None:
    convert_to(photos, tmp_path, format)
    path = tmp_path / TARGETS[format]
    store = open_store(path)
    row = store.index[17]
    flip_bits(store.files[row["file"]], int(row["offset"]) + int(row["bytes"]) // 2, 4)
    problems = verify_store(path)
    assert any("it is not what was written" in problem for problem in problems)
    assert any(store.name(17) in problem for problem in problems)


def test_changes_of_the_source_are_found(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 12)
    bad = source / "class0" / "bad.jpg"
    bad.write_bytes(b"no image")
    convert_to(source, tmp_path, "webdataset")
    assert verify_store(tmp_path / "x", source) == []

    changed = source / "class1" / "0001.jpg"
    truncated = source / "class1" / "0004.jpg"
    changed.write_bytes(encoded(picture(50, 50)))
    truncated.write_bytes(truncated.read_bytes()[:100])
    bad.write_bytes(encoded(picture(50, 50)))
    problems = "\n".join(verify_store(tmp_path / "x", source))
    assert "class1/0001.jpg converts to different bytes now" in problems
    assert "it was made from class1/0004.jpg, which can no longer be decoded: truncated" in problems
    assert "class0/bad.jpg was left out, but can be decoded now" in problems
    assert problems.count("\n") == 2

    changed.unlink()
    assert "it has 12 images now; 13 were converted" in verify_store(tmp_path / "x", source)[0]
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match=r"x\.json from convert\.py is missing"):
        verify_store(tmp_path / "x", source)


def test_changed_label_in_a_shard_is_found(photos: Path, tmp_path: Path) -> None:
    """The label of a WebDataset is a file of its own in the archive, without a checksum."""
    convert_to(photos, tmp_path, "webdataset")
    (shard,) = (tmp_path / "x").glob("*.tar")
    header = shard.read_bytes().index(b".cls") // 512 * 512
    flip_bits(shard, header + 512, 1)
    assert verify_store(tmp_path / "x") == [f"{shard} has other labels than its index"]


def test_plan_of_another_version_is_refused(photos: Path, tmp_path: Path) -> None:
    convert_to(photos, tmp_path, "webdataset")
    description = read_description(tmp_path / "x")
    description["plan"]["rotation"] = 90
    (tmp_path / "x.json").write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"x\.json was written by another version of convert\.py.*rotation"
    ):
        verify_store(tmp_path / "x", photos)
    with pytest.raises(ValueError, match="rotation 90 instead of None"):
        convert_to(photos, tmp_path, "webdataset")


def test_missing_or_truncated_shard_is_named(photos: Path, tmp_path: Path) -> None:
    convert_to(photos, tmp_path, "webdataset", shards=3)
    shard = tmp_path / "x" / "shard-00001.tar"
    data = shard.read_bytes()
    shard.unlink()
    for open_or_verify in (open_store, verify_store):
        with pytest.raises(ValueError, match=r"x lacks shard-00001\.tar; restore"):
            open_or_verify(tmp_path / "x")
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"shard-00001\.tar has \d+ bytes instead of"):
        open_store(tmp_path / "x")
    shard.write_bytes(data)
    assert read_description(tmp_path / "x")["images"] == 60
    assert verify_store(tmp_path / "x", photos) == []


@pytest.fixture
def source_with_a_reject(photos: Path, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    (source / "class0" / "bad.jpg").write_bytes(b"no image")
    return source


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("x.beton.json", '"seed"', '"sead"'),
        ("x.beton.rejects.jsonl", '"source"', '"sourca"'),
        ("x.beton.rejects.jsonl", '"source": ', '"source": 99'),
        ("x.beton.rejects.jsonl", "{", ""),
    ],
)
def test_damaged_description_or_rejects_are_refused(
    source_with_a_reject: Path, tmp_path: Path, file: str, old: str, new: str
) -> None:
    convert_to(source_with_a_reject, tmp_path, "beton")
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    message = r"x\.beton\.json (or .* is damaged .*: restore it|was written by another version)"
    with pytest.raises(ValueError, match=message):
        verify_store(tmp_path / "x.beton", source_with_a_reject)


def test_changed_description_is_found(source_with_a_reject: Path, tmp_path: Path) -> None:
    convert_to(source_with_a_reject, tmp_path, "beton")
    description = tmp_path / "x.beton.json"
    text = description.read_text()
    description.write_text(text.replace('"class1"', '"klass1"', 1))
    (problem, *_) = verify_store(tmp_path / "x.beton", source_with_a_reject)
    assert "names other classes than the source: class0" in problem
    description.write_text(text.replace('"bytes"', '"bites"'))
    with pytest.raises(ValueError, match=r"x\.beton\.json is damaged \(it lacks 'bytes'\)"):
        convert_to(source_with_a_reject, tmp_path, "beton")
