"""Sources in parquet files: the hub's layout, others' columns, splits, and damaged files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.conversion.sources import open_source
from tests.helpers.sources import JPEGS, cells, contents_of, fail, open_quietly, write_parquet


def test_files_of_the_hugging_face_hub_are_read(tmp_path: Path, scratch: Path) -> None:
    rows = [
        *cells(0, 1),
        {"bytes": JPEGS[2], "path": None},
        {"bytes": None, "path": "gone.jpg"},
        None,
        {"bytes": b"", "path": ""},
    ]
    path = write_parquet(tmp_path / "some.parquet", rows, [1, 0, -1, 0, 1, None], ["wolf", "bear"])
    source = open_quietly(path, scratch)
    assert source.classes == ["wolf", "bear"]
    assert contents_of(source) == [
        ("0.jpg", JPEGS[0], "bear"),
        ("1.jpg", JPEGS[1], "wolf"),
        ("some.parquet, row 2", JPEGS[2], None),
    ]
    rejects = ["gone.jpg", "some.parquet, row 4", "some.parquet, row 5"]
    assert source.rejects == dict.fromkeys(rejects, "the row holds no image")


def test_files_of_one_split_are_one_source(tmp_path: Path, scratch: Path) -> None:
    for part in range(2):
        name = f"data/train-{part:05d}-of-00002.parquet"
        write_parquet(tmp_path / name, cells(2 * part, 2 * part + 1), [part, part], ["a", "b"])
    expected = [(f"{i}.jpg", JPEGS[i], "aabb"[i]) for i in range(4)]
    assert contents_of(open_quietly(tmp_path, scratch)) == expected

    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", cells(5), [0], ["a", "b"])
    message = r"holds the splits test, train: name one, '(.*)'"
    with pytest.raises(ValueError, match=message) as refused:
        open_quietly(tmp_path, scratch)
    assert str(refused.value).endswith(f"'{tmp_path}/data/test-*'")
    for pattern in ("train-*", "t*-{00000..00001}-of-00002.parquet"):
        source = open_quietly(f"{tmp_path}/data/{pattern}", scratch)
        assert contents_of(source) == expected


@pytest.mark.parametrize(
    "names",
    [["train/0.parquet", "validation/0.parquet"], ["all-0-of-2.parquet", "few-1-of-2.parquet"]],
)
def test_splits_are_recognized_by_their_folders_too(
    tmp_path: Path, scratch: Path, names: list[str]
) -> None:
    for name in names:
        write_parquet(tmp_path / name, cells(0), [0])
    with pytest.raises(ValueError, match=r"holds (the splits|train/ and validation/)"):
        open_quietly(tmp_path, scratch)


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"img": pa.array(JPEGS[:2]), "fine_label": [1, 0], "coarse_label": [5, 5]}, ["0", "1"]),
        ({"id": [7, 8], "image.bytes": pa.array(JPEGS[:2], pa.large_binary())}, []),
        (
            {"md5": [b"1", b"2"], "photo": [{"bytes": i} for i in JPEGS[:2]], "label": ["b", "a"]},
            ["a", "b"],
        ),
        ({"image": JPEGS[:2], "label": pa.array(["b", "a"]).dictionary_encode()}, ["a", "b"]),
        ({"image": JPEGS[:2], "label": pa.array([[1], [0]])}, []),
    ],
    ids=["cifar100", "flat", "struct", "dictionary", "many labels"],
)
def test_columns_of_other_names_and_types_are_found(
    tmp_path: Path, scratch: Path, columns: dict[str, Any], classes: list[str]
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = open_quietly(tmp_path / "x.parquet", scratch)
    assert [source.read(0), source.read(1)] == JPEGS[:2]
    assert (source.classes, source.labels.tolist()) == (classes, [1, 0] if classes else [-1, -1])


def test_features_name_the_column_of_labels(tmp_path: Path, scratch: Path) -> None:
    table = pa.table({"image": JPEGS[:2], "id": [5, 6], "breed": [1, 0]})
    features = {
        "breed": {"_type": "ClassLabel", "names": ["pug", "boxer"]},
        "id": {"_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    contents = contents_of(open_quietly(tmp_path / "x.parquet", scratch))
    assert [label for *_, label in contents] == ["boxer", "pug"]


def test_identity_depends_on_the_names_of_the_images(tmp_path: Path, scratch: Path) -> None:
    identities = []
    for name in ("a.jpg", "b.jpg"):
        path = write_parquet(tmp_path / "x.parquet", [{"bytes": JPEGS[0], "path": name}], [0])
        identities.append(open_quietly(path, scratch).identity)
    assert identities[0] != identities[1]


def test_staging_file_is_used_until_the_parquet_file_changes(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", cells(0, 1), [0, 1])
    first = open_quietly(path, scratch)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", fail)
        assert contents_of(open_quietly(path, scratch)) == contents_of(first)
        write_parquet(path, cells(0, 1), [1, 1])
        with pytest.raises(AssertionError):
            open_quietly(path, scratch)
    assert open_quietly(path, scratch).identity != first.identity


def test_damaged_file_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    message = r"x\.parquet cannot be read from row 0 on .*download it again"
    with pytest.raises(ValueError, match=message):
        open_quietly(path, scratch)


def test_file_without_images_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": ["0.jpg"], "text": ["a cat"]}), path)
    message = r"x\.parquet has no column of images, such as image: it has image, text"
    with pytest.raises(ValueError, match=message):
        open_quietly(path, scratch)


def test_files_of_different_classes_are_refused(tmp_path: Path, scratch: Path) -> None:
    write_parquet(tmp_path / "d" / "0.parquet", cells(0), [0], ["a", "b"])
    write_parquet(tmp_path / "d" / "1.parquet", cells(0), [0], ["b", "a"])
    with pytest.raises(ValueError, match=r"1\.parquet has different class names"):
        open_quietly(tmp_path / "d", scratch)


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path, scratch: Path) -> None:
    images = [{"bytes": os.urandom(10_000), "path": None} for _ in range(2000)]
    write_parquet(tmp_path / "x.parquet", images, [0] * 2000)
    del images
    before = pa.total_allocated_bytes()
    allocated: list[int] = []

    def measure(done: int, total: int) -> None:
        allocated.append(pa.total_allocated_bytes())

    open_source(tmp_path / "x.parquet", measure, scratch)
    assert len(allocated) > 7
    assert max(allocated) - before < 2e6


def test_damaged_page_is_reported_with_its_row(tmp_path: Path, scratch: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", cells(*(i % 7 for i in range(60))), range(60))
    data = bytearray(path.read_bytes())
    data[pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read from row 48 on"):
        open_quietly(path, scratch)


@pytest.mark.parametrize(("module", "spec"), [("pyarrow", "x.parquet"), ("fsspec", "memory://x")])
def test_missing_package_is_named(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, module: str, spec: str
) -> None:
    write_parquet(tmp_path / "x.parquet", cells(0), [0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{module} is missing: uv sync --extra convert"):
        open_quietly(spec, scratch)
