"""What convert.py can read: folders, parquet files, torchvision's data sets, URLs, and whatever can be iterated."""

from __future__ import annotations

import builtins
import errno
import http.server
import io
import json
import os
import pickle
import re
import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.error import URLError

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from fsspec.implementations.http import HTTPFileSystem
from PIL import Image

from pipeline.conversion import sources
from pipeline.conversion.sources import open_source, spooled
from pipeline.conversion.staging import Source
from pipeline.formats import FORMATS
from pipeline.formats.index import ROW
from pipeline.formats.record_store import RecordStore
from pipeline.images import BadImage
from tests.helpers.images import encoded, picture, write_photos

JPEGS = [encoded(picture(12 + i, 9, seed=i), quality=80) for i in range(7)]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WAITS_S", (0.01, 0.01, 0))


def opened(spec: str | Path, scratch: Path) -> Source:
    return open_source(spec, lambda done, total: None, scratch)


def everything(source: Source) -> list[tuple[str, bytes, str | None]]:
    """Name, image and class of each; two threads read, which must not disturb each other."""
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(source.read, range(len(source))))
    classes = [source.classes[label] if label >= 0 else None for label in source.labels]
    assert source.labels.dtype == np.int32
    return [(source.name(i), images[i], classes[i]) for i in range(len(source))]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was not to be touched")


# ── folders, and data sets of ours ───────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_listed_without_opening_a_file(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, image in {
        "dog/a.jpg": JPEGS[0],
        "cat/deep/b.PNG": b"not looked into",
        "cat/.c.jpg": b"",
        "d.txt": b"",
    }.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(image)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        source = pickle.loads(pickle.dumps(opened(tmp_path / "data", scratch)))
    assert everything(source) == [
        ("cat/deep/b.PNG", b"not looked into", "cat"),
        ("dog/a.jpg", JPEGS[0], "dog"),
    ]
    (tmp_path / "data" / "dog" / "a.jpg").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(OSError, match=r"the images in .*data are out of reach: No such file"):
        source.read(0)


def test_its_identity_changes_with_names_and_classes_but_not_with_the_place(
    tmp_path: Path, scratch: Path
) -> None:
    one, other = (opened(write_photos(tmp_path / name, 6), scratch) for name in ("one", "other"))
    assert one.identity == other.identity
    (tmp_path / "other" / "class0" / "0000.jpg").rename(tmp_path / "other" / "class1" / "0000.jpg")
    assert opened(tmp_path / "other", scratch).identity != one.identity


def test_training_and_test_images_are_not_mixed(tmp_path: Path, scratch: Path) -> None:
    write_photos(tmp_path / "data" / "train", 6)
    assert opened(tmp_path / "data", scratch).classes == ["class0", "class1", "class2"]
    write_photos(tmp_path / "data" / "val", 3)
    with pytest.raises(ValueError, match=r"data holds train/ and val/: convert each by itself"):
        opened(tmp_path / "data", scratch)


def test_what_is_no_source_is_refused(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    reasons = {
        "empty": "holds no image",
        "notes.txt": "is no image data",
        "{0,1}": "is not there",
        "gone": "is not there",
    }
    for name, reason in reasons.items():
        with pytest.raises(
            ValueError, match=rf"{re.escape(name)} {reason}.*\.jpg.*\.parquet.*beton"
        ):
            opened(tmp_path / name, scratch)


class Lines:
    """A format in the place of one of ours: JPEGs one after the other, which `<path>.json` has names for."""

    SUFFIX = ".tar"

    def files(self, path: Path) -> list[Path]:
        return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar"))

    def open(self, path: Path, progress: object) -> RecordStore:
        files, rows = self.files(path), []
        for number, file in enumerate(files):
            data = file.read_bytes()
            begins = [i for i in range(len(data)) if data[i:].startswith(b"\xff\xd8\xff")]
            ends = [*begins[1:], len(data)]
            rows += [(number, 1, 1, number, b, e - b, 0) for b, e in zip(begins, ends, strict=True)]
        beside = path.with_name(path.name + ".json")
        classes = json.loads(beside.read_text())["classes"] if beside.exists() else ["0", "1", "2"]
        return RecordStore(path, files, np.array(rows, dtype=ROW), classes)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "webdataset", Lines())  # type: ignore[misc]


@pytest.mark.usefixtures("lines")
def test_a_data_set_of_ours_is_read_through_its_store(tmp_path: Path, scratch: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(JPEGS[2 * i] + JPEGS[2 * i + 1])
    source = pickle.loads(pickle.dumps(opened(tmp_path, scratch)))
    read = everything(source)
    assert [image for _, image, _ in read] == JPEGS[:4]
    assert [label for *_, label in read] == ["0", "0", "1", "1"]
    assert [name for name, *_ in read] == [
        f"{tmp_path.name}/{i}.tar, byte {at}" for i in (0, 1) for at in (0, len(JPEGS[2 * i]))
    ]
    os.truncate(tmp_path / "1.tar", 3)
    with pytest.raises(BadImage, match="it cannot be read"):
        source.read(2)
    assert opened(tmp_path / "0.tar", scratch).identity != source.identity


# ── the spool ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_iterable_is_read_once_and_then_at_random(scratch: Path) -> None:
    labels = ["dog", None, "ant", "dog", "cat", "ant", None]
    source = spooled(iter(zip(JPEGS, labels, strict=True)), [], scratch)
    assert source.classes == ["ant", "cat", "dog"]
    assert everything(source) == [(f"image {i}", JPEGS[i], labels[i]) for i in range(7)]
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


def test_numbers_are_labels_as_they_are(scratch: Path) -> None:
    assert spooled(zip(JPEGS, [2, 0, np.int64(1)], strict=False), [], scratch).classes == [
        "0",
        "1",
        "2",
    ]
    named = spooled(zip(JPEGS, [1, "b", "a", None], strict=False), ["b", "a"], scratch)
    assert (named.classes, named.labels.tolist()) == (["b", "a"], [1, 0, 1, -1])
    assert spooled(zip(JPEGS, [None, None], strict=False), [], scratch).classes == []


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([-1], []),
        ([1 << 31], []),
        ([1 << 40], []),
        ([1.5], []),
        ([[1]], []),
        ([1.0], ["a", "b"]),
        ([0, "a"], []),
        (["a", 0], []),
        ([2], ["a", "b"]),
        (["c"], ["a"]),
    ],
    ids=str,
)
def test_labels_that_cannot_be_are_refused(
    scratch: Path, labels: list[Any], classes: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"image \d has the label .*: labels are .* or None"):
        spooled(zip(JPEGS, labels, strict=False), classes, scratch)


def test_images_that_are_none_are_left_out_and_named(scratch: Path) -> None:
    source = spooled([(b"", 0), (JPEGS[0], 0)], [], scratch)
    assert (len(source), list(source.rejects)) == (1, ["image 0"])
    with pytest.raises(
        ValueError, match="holds no image that can be used; the first, image 0: it is empty"
    ):
        spooled([(b"", 0)], [], scratch)


def test_a_complete_spool_is_used_again_and_a_partial_one_is_not(scratch: Path) -> None:
    def images(upto: int, then: type[BaseException]) -> Iterator[tuple[bytes, int]]:
        yield b"", 0
        yield from ((JPEGS[i], i) for i in range(upto))
        raise then

    with pytest.raises(KeyboardInterrupt):
        spooled(images(3, KeyboardInterrupt), [], scratch, "seven")
    with pytest.raises(KeyboardInterrupt):
        spooled(images(3, KeyboardInterrupt), [], scratch, "seven")
    first = spooled(((b"", 0), *zip(JPEGS, range(7), strict=True)), [], scratch, "seven")
    again = spooled(images(0, AssertionError), [], scratch, "seven")
    assert everything(again) == everything(first)
    assert (again.rejects, again.identity) == (first.rejects, first.identity)
    with pytest.raises(KeyboardInterrupt):
        spooled(images(0, KeyboardInterrupt), [], scratch, "eight")
    spooled(zip(JPEGS, range(7), strict=True), [], scratch, "seven")
    os.truncate(scratch / "spool", 100)
    with pytest.raises(KeyboardInterrupt):
        spooled(images(0, KeyboardInterrupt), [], scratch, "seven")


def test_what_has_no_identity_is_never_taken_for_another(scratch: Path) -> None:
    one, other = (spooled([(image, 0)], [], scratch).read(0) for image in JPEGS[:2])
    assert (one, other) == (JPEGS[0], JPEGS[1])


def test_the_identity_is_that_of_labels_and_sizes(scratch: Path) -> None:
    sources = [
        [(JPEGS[0], 0)],
        [(JPEGS[0], 1)],
        [(JPEGS[0] + b"x", 0)],
        [(JPEGS[0], 0), (JPEGS[0], 0)],
        [(JPEGS[0], 0)],
    ]
    *different, same = (spooled(source, [], scratch).identity for source in sources)
    assert len(set(different)) == 4
    assert same == different[0]


def test_memory_stays_small_however_much_comes(scratch: Path) -> None:
    image = bytes(200_000)
    tracemalloc.start()
    source = spooled(((image[i % 9 :], i % 10) for i in range(1000)), [], scratch)  # 200 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.read(999)) == 200_000 - 999 % 9
    assert peak < 4e6


def test_a_full_disk_is_said(scratch: Path) -> None:
    scratch.mkdir()
    (scratch / "spool").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        spooled(((bytes(1 << 20), 0) for _ in range(3)), [], scratch)


# ── parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_parquet(
    path: Path, cells: Iterable[Any], labels: Iterable[Any], names: list[str] | None = None
) -> Path:
    """As `datasets.Dataset.to_parquet` writes it: a struct of bytes and path, and the features in the metadata."""
    cell_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {"image": pa.array(cells, cell_type), "extra": pa.array(labels), "label": pa.array(labels)}
    )
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "0"})}
    pq.write_table(
        table.replace_schema_metadata(about), path, row_group_size=50, write_page_checksum=True
    )
    return path


def cells(*numbers: int) -> list[dict[str, Any]]:
    return [{"bytes": JPEGS[i], "path": f"{i}.jpg"} for i in numbers]


def test_parquet_as_hugging_face_writes_it(tmp_path: Path, scratch: Path) -> None:
    some = [
        *cells(0, 1),
        {"bytes": JPEGS[2], "path": None},
        {"bytes": None, "path": "gone.jpg"},
        None,
        {"bytes": b"", "path": ""},
    ]
    path = write_parquet(tmp_path / "some.parquet", some, [1, 0, -1, 0, 1, None], ["wolf", "bear"])
    source = opened(path, scratch)
    assert source.classes == ["wolf", "bear"]
    assert everything(source) == [
        ("0.jpg", JPEGS[0], "bear"),
        ("1.jpg", JPEGS[1], "wolf"),
        ("some.parquet, row 2", JPEGS[2], None),
    ]
    assert source.rejects == dict.fromkeys(
        ["gone.jpg", "some.parquet, row 4", "some.parquet, row 5"], "the row holds no image"
    )


def test_the_files_of_one_split_are_one_source(tmp_path: Path, scratch: Path) -> None:
    for part in range(2):
        name = f"data/train-{part:05d}-of-00002.parquet"
        write_parquet(tmp_path / name, cells(2 * part, 2 * part + 1), [part, part], ["a", "b"])
    expected = [(f"{i}.jpg", JPEGS[i], "aabb"[i]) for i in range(4)]
    assert everything(opened(tmp_path, scratch)) == expected
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", cells(5), [0], ["a", "b"])
    with pytest.raises(
        ValueError, match=r"holds the splits test, train: name one, '(.*)'"
    ) as refused:
        opened(tmp_path, scratch)
    assert str(refused.value).endswith(f"'{tmp_path}/data/test-*'")
    assert everything(opened(f"{tmp_path}/data/train-*", scratch)) == expected
    assert (
        everything(opened(f"{tmp_path}/data/t*-{{00000..00001}}-of-00002.parquet", scratch))
        == expected
    )


@pytest.mark.parametrize(
    "names",
    [["train/0.parquet", "validation/0.parquet"], ["all-0-of-2.parquet", "few-1-of-2.parquet"]],
)
def test_splits_are_told_by_their_folders_too(
    tmp_path: Path, scratch: Path, names: list[str]
) -> None:
    for name in names:
        write_parquet(tmp_path / name, cells(0), [0])
    with pytest.raises(ValueError, match=r"holds (the splits|train/ and validation/)"):
        opened(tmp_path, scratch)


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
    ids=["cifar100", "flat", "struct", "dictionary", "many"],
)
def test_columns_go_by_several_names(
    tmp_path: Path, scratch: Path, columns: dict[str, Any], classes: list[str]
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet", scratch)
    assert [source.read(0), source.read(1)] == JPEGS[:2]
    assert (source.classes, source.labels.tolist()) == (classes, [1, 0] if classes else [-1, -1])


def test_the_features_say_which_column_is_the_label(tmp_path: Path, scratch: Path) -> None:
    table = pa.table({"image": JPEGS[:2], "id": [5, 6], "breed": [1, 0]})
    features = {
        "breed": {"_type": "ClassLabel", "names": ["pug", "boxer"]},
        "id": {"_type": "Value"},
    }
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "x.parquet")
    assert [label for *_, label in everything(opened(tmp_path / "x.parquet", scratch))] == [
        "boxer",
        "pug",
    ]


def test_the_identity_is_that_of_names_too(tmp_path: Path, scratch: Path) -> None:
    one, other = ([{"bytes": JPEGS[0], "path": name}] for name in ("a.jpg", "b.jpg"))
    first, second = (
        opened(write_parquet(tmp_path / "x.parquet", rows, [0]), scratch) for rows in (one, other)
    )
    assert first.identity != second.identity


def test_a_spool_of_parquet_is_used_until_the_file_changes(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", cells(0, 1), [0, 1])
    first = opened(path, scratch)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", refuse)
        assert everything(opened(path, scratch)) == everything(first)
        write_parquet(path, cells(0, 1), [1, 1])
        with pytest.raises(AssertionError):
            opened(path, scratch)
    assert opened(path, scratch).identity != first.identity


def test_parquet_that_cannot_be_used_is_refused(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(
        ValueError, match=r"a\.parquet cannot be read from row 0 on .*fetch it again"
    ):
        opened(tmp_path / "a.parquet", scratch)
    pq.write_table(pa.table({"image": ["0.jpg"], "text": ["a cat"]}), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b\.parquet has no column of images, such as image: it has image, text"
    ):
        opened(tmp_path / "b.parquet", scratch)
    write_parquet(tmp_path / "d" / "0.parquet", cells(0), [0], ["a", "b"])
    write_parquet(tmp_path / "d" / "1.parquet", cells(0), [0], ["b", "a"])
    with pytest.raises(ValueError, match=r"1\.parquet names other classes"):
        opened(tmp_path / "d", scratch)


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path, scratch: Path) -> None:
    images = [{"bytes": os.urandom(10_000), "path": None} for _ in range(2000)]
    write_parquet(tmp_path / "x.parquet", images, [0] * 2000)
    del images
    before, held = pa.total_allocated_bytes(), list[int]()
    open_source(
        tmp_path / "x.parquet", lambda done, total: held.append(pa.total_allocated_bytes()), scratch
    )
    assert len(held) > 7
    assert max(held) - before < 2e6


def test_a_damaged_page_is_told_with_its_row(tmp_path: Path, scratch: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", cells(*(i % 7 for i in range(60))), range(60))
    data = bytearray(path.read_bytes())
    data[pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read from row 48 on"):
        opened(path, scratch)


@pytest.mark.parametrize(("module", "spec"), [("pyarrow", "x.parquet"), ("fsspec", "memory://x")])
def test_a_missing_package_is_named(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, module: str, spec: str
) -> None:
    write_parquet(tmp_path / "x.parquet", cells(0), [0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=f"{module} is missing: uv sync --extra convert"):
        opened(spec, scratch)


# ── torchvision ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision's data sets are put."""
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "torchvision"


@pytest.fixture
def cifar(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-10 in its own layout, with 3 images a file; the checksums of these files in the place of its own."""
    rng = np.random.default_rng(0)
    folder, kind = home / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    folder.mkdir(parents=True)
    pixels = {}
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels[name] = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": pixels[name].reshape(3, -1), "labels": [0, 9, 4]})
        )
        checksum = md5((folder / name).read_bytes()).hexdigest()
        lists["test_list" if name == "test_batch" else "train_list"].append([name, checksum])
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    meta = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": md5((folder / "batches.meta").read_bytes()).hexdigest(),
    }
    for attribute, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(kind, attribute, value)
    return pixels


@pytest.mark.parametrize("split", ["", ":train", ":test"])
def test_cifar_keeps_its_pixels_labels_and_names(
    cifar: dict[str, np.ndarray], scratch: Path, split: str
) -> None:
    source = opened(f"torchvision:CIFAR10{split}", scratch)
    batches = [
        pixels for name, pixels in cifar.items() if (name == "test_batch") == (split == ":test")
    ]
    for i, pixels in enumerate(np.concatenate(batches)):
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(source.read(i)))).transpose(2, 0, 1), pixels
        )
    assert len(source) == (3 if split == ":test" else 15)
    assert (source.classes[9], source.labels[:3].tolist()) == ("class 9", [0, 9, 4])
    assert source.name(1) == f"torchvision:CIFAR10{split}, image 1"


def test_a_data_set_of_files_is_read_where_it_lies(home: Path, scratch: Path) -> None:
    for i, wordnet in enumerate(["n01440764", "n02102040", "n01440764"]):
        file = home / "imagenette2" / "train" / wordnet / f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(JPEGS[i])
    source = opened("torchvision:Imagenette", scratch)
    assert [(image, label) for _, image, label in everything(source)] == [
        (JPEGS[0], "tench, Tinca tinca"),
        (JPEGS[2], "tench, Tinca tinca"),
        (JPEGS[1], "English springer, English springer spaniel"),
    ]
    assert source.name(1) == "imagenette2/train/n01440764/2.JPEG"
    assert not list(scratch.iterdir())


def test_files_with_labels_in_a_table_too(home: Path, scratch: Path) -> None:
    for folder in ("images", "annotations"):
        (home / "oxford-iiit-pet" / folder).mkdir(parents=True)
    lines = []
    for i, name in enumerate(["pug_1", "Bombay_2", "pug_3"]):
        (home / "oxford-iiit-pet" / "images" / f"{name}.jpg").write_bytes(JPEGS[i])
        lines.append(f"{name} {2 - i % 2 * 1} 1 1\n")
    (home / "oxford-iiit-pet" / "annotations" / "trainval.txt").write_text("".join(lines))
    read = everything(opened("torchvision:OxfordIIITPet:trainval", scratch))
    assert [(image, label) for _, image, label in read] == [
        (JPEGS[0], "Pug"),
        (JPEGS[1], "Bombay"),
        (JPEGS[2], "Pug"),
    ]


def test_images_without_labels_have_none(
    home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stl:
        def __init__(self, root: Path, split: str = "train", download: bool = False) -> None:
            assert (root, split, download) == (home, "unlabeled", True)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return picture(20, 10, seed=i, mode="CMYK"), -1

    monkeypatch.setattr(torchvision.datasets, "STL10", Stl)
    source = opened("torchvision:STL10:unlabeled", scratch)
    assert (source.classes, source.labels.tolist()) == ([], [-1, -1])
    assert Image.open(io.BytesIO(source.read(1))).mode == "RGB"


def test_without_a_network_it_is_said_where_the_files_go(
    home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(
        ValueError, match=r"torchvision:CIFAR100 .*not known.* into .*torchvision by hand"
    ) as refused:
        opened("torchvision:CIFAR100", scratch)
    assert str(home) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR11", "has no 'CIFAR11' that it can download; it has, say, .*CIFAR10"),
        ("torchvision:ImageFolder", "has no 'ImageFolder' that it can download"),
        ("torchvision:", "has no '' that it can download"),
        ("torchvision:SVHN:tset", "Unknown value 'tset' for argument split"),
        ("torchvision:CIFAR10:tset", "has the splits train and test"),
    ],
)
@pytest.mark.usefixtures("home")
def test_unknown_data_sets_and_splits_are_refused(scratch: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{spec} ?.*{message}"):
        opened(spec, scratch)


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder over HTTP. `answers` are given before: a status for the next requests of a path."""

    answers: dict[str, list[int]]
    asked: list[str]


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        waiting = self.server.answers.get(self.path)
        if waiting:
            self.send_error(waiting.pop())
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    made = Server(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(tmp_path / "www")))  # type: ignore[arg-type]
    made.answers, made.asked = {}, []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    HTTPFileSystem.clear_instance_cache()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_a_remote_folder_is_as_a_local_one(
    tmp_path: Path, scratch: Path, memory: Any, server: Server
) -> None:
    for name in (
        "größe 1/a b.jpg",
        "größe 1/.hidden.jpg",
        "zwei/c.png",
        "zwei/deep/d.jpg",
        "zwei/notes.txt",
    ):
        (tmp_path / "www" / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "www" / "photos" / name).write_bytes(JPEGS[len(name) % 7])
    memory.put(str(tmp_path / "www" / "photos"), "/photos", recursive=True)
    local = everything(opened(tmp_path / "www" / "photos", scratch))
    assert [name for name, *_ in local] == ["größe 1/a b.jpg", "zwei/c.png", "zwei/deep/d.jpg"]
    for spec in (
        "memory://photos",
        url(server, "photos"),
        url(server, "photos/"),
        (tmp_path / "www/photos").as_uri(),
    ):
        assert sorted(everything(opened(spec, scratch))) == local, spec
    server.asked.clear()
    assert sorted(everything(opened(url(server, "photos"), scratch))) == local
    asked = [path for path in server.asked if path.endswith("jpg")]
    opened(url(server, "photos"), scratch)
    assert [path for path in server.asked if path.endswith("jpg")] == asked, "the spool was used"


def test_a_network_that_fails_is_asked_again(tmp_path: Path, scratch: Path, server: Server) -> None:
    write_photos(tmp_path / "www" / "photos", 6)
    server.answers = {
        "/photos/class0/0003.jpg": [503, 500],
        "/photos/class1/0004.jpg": [404],
        "/photos/": [502],
    }
    server.answers["/photos/class2/0005.jpg"] = [403]
    source = opened(url(server, "photos"), scratch)
    assert len(source) == 4
    assert list(source.rejects) == ["class1/0004.jpg", "class2/0005.jpg"]
    assert "0005.jpg is not there, or not for everyone" in source.rejects["class2/0005.jpg"]
    server.answers = {"/photos/class0/0003.jpg": [503] * 9}
    (scratch / "spool").unlink()
    with pytest.raises(OSError, match=r"0003\.jpg cannot be fetched: .*503"):
        opened(url(server, "photos"), scratch)


def test_remote_splits_are_not_mixed(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/train/a/1.jpg": JPEGS[0], "/d/val/a/1.jpg": JPEGS[1]})
    with pytest.raises(ValueError, match=r"memory://d holds train and val: convert each by itself"):
        opened("memory://d", scratch)
    assert everything(opened("memory://d/val", scratch)) == [("a/1.jpg", JPEGS[1], None)]


def test_remote_parquet_is_fetched_file_by_file(
    tmp_path: Path, scratch: Path, server: Server, memory: Any
) -> None:
    for part in range(3):
        write_parquet(
            tmp_path / "www" / f"train-{part}-of-3.parquet", cells(part), [part], ["a", "b", "c"]
        )
    expected = [(f"{i}.jpg", JPEGS[i], "abc"[i]) for i in range(3)]
    assert everything(opened(url(server, "train-{0..2}-of-3.parquet"), scratch)) == expected
    assert sorted(path.name for path in scratch.iterdir()) == ["spool", "spool.npz"]
    memory.put(str(tmp_path / "www"), "/www", recursive=True)
    assert everything(opened("memory://www", scratch)) == expected
    assert everything(opened("memory://www/*-of-3.parquet", scratch)) == expected
    assert (
        everything(opened(url(server, "train-1-of-3.parquet?download=true"), scratch))
        == expected[1:2]
    )


@pytest.mark.usefixtures("lines")
def test_remote_shards_are_fetched_and_opened(
    tmp_path: Path, scratch: Path, server: Server
) -> None:
    folder = tmp_path / "www" / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"..{i:02d}.tar").write_bytes(JPEGS[i])
    (tmp_path / "www" / "set.json").write_text(json.dumps({"classes": ["x", "y", "z"]}))
    expected = [(JPEGS[i], "xyz"[i]) for i in range(3)]
    braces = "set/..{00..02}.tar"
    for spec in (
        url(server, braces),
        url(server, "set"),
        f"{tmp_path}/www/{braces}",
        f"{folder.as_uri()}/..*.tar",
    ):
        source = opened(spec, scratch)
        assert [(image, label) for _, image, label in everything(source)] == expected, spec
        assert source.name(1).partition("/")[2] == "000001.tar, byte 0"
    server.asked.clear()
    opened(url(server, braces), scratch)
    assert not [path for path in server.asked if path.endswith(".tar")], (
        "what was fetched is used again"
    )
    server.answers = {"/set.json": [503] * 9}
    with pytest.raises(
        OSError, match=r"set\.json cannot be fetched"
    ):  # names of classes are not lost in silence
        opened(url(server, braces), scratch)
    single = opened(url(server, "set/..01.tar"), scratch)
    assert (single.read(0), single.classes) == (JPEGS[1], ["0", "1", "2"])


@pytest.mark.usefixtures("lines")
def test_names_of_a_server_are_no_paths(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = write_parquet(tmp_path / "x", cells(0), [0]).read_bytes()
    (tmp_path / "x").unlink()

    class Fs:
        protocol = "evil"

        def find(self, path: str) -> list[str]:
            return [
                f"{path}/{name}"
                for name in ("../../a.parquet", f"{tmp_path}/b.parquet", "c/../../d.parquet")
            ]

        def get_file(self, path: str, to: str) -> None:
            if path.endswith(".json"):
                raise FileNotFoundError
            Path(to).write_bytes(JPEGS[0] if path.endswith("tar") else parquet)

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda spec: (Fs(), spec))
    assert len(opened("evil://x", scratch)) == 3
    assert len(opened("evil://x/../../{1..2}.tar", scratch)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    files = sorted(path.name for path in scratch.rglob("*") if path.is_file())
    assert files == ["000000.tar", "000001.tar", "spool", "spool.npz"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere://x", "nowhere"),
        ("s3://bucket/x", "s3fs"),
        ("memory://nothing/*.tar", "matches no file"),
        ("memory://nothing-{3..1}.tar", "matches no file"),
        ("memory://nothing", "memory://nothing holds no image"),
        ("memory://d/*", "name one folder, or files of one kind"),
    ],
)
def test_urls_that_lead_nowhere_are_refused(
    scratch: Path, memory: Any, spec: str, message: str
) -> None:
    memory.pipe({"/d/a.tar": b"1", "/d/b.parquet": b"2"})
    with pytest.raises(ValueError, match=message):
        opened(spec, scratch)


def test_a_full_disk_is_not_tried_again(
    scratch: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({"/d/0.tar": JPEGS[0]})
    tries = []

    def full(path: str, to: str) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", staticmethod(full))
    with pytest.raises(OSError, match="No space left"):
        opened("memory://d/0.tar", scratch)
    assert len(tries) == 1


def test_an_archive_among_images_is_none_of_them(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/a/1.jpg": JPEGS[0], "/d/a/backup.tar": b"", "/d/b/2.jpg": JPEGS[1]})
    assert everything(opened("memory://d", scratch)) == [
        ("a/1.jpg", JPEGS[0], "a"),
        ("b/2.jpg", JPEGS[1], "b"),
    ]


@pytest.mark.usefixtures("lines")
def test_numbers_may_follow_the_suffix(scratch: Path, memory: Any) -> None:
    """As TFRecords are often named."""
    memory.pipe({f"/d/cifar-train.tar-0000{i}-of-00002": JPEGS[i] for i in range(2)})
    source = opened("memory://d/cifar-train.tar-*", scratch)
    assert [source.read(0), source.read(1)] == JPEGS[:2]


def test_a_missing_shard_is_named(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/0.tar": JPEGS[0]})
    with pytest.raises(OSError, match=r"/d/1\.tar is not there"):
        opened("memory://d/{0..1}.tar", scratch)


def test_images_are_fetched_side_by_side_but_not_all_at_once(
    scratch: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/d/{i:04d}.jpg": JPEGS[i % 7] for i in range(400)})
    lock, now, most, asked = threading.Lock(), [0], [0], []
    cat = memory.cat_file

    def slow(path: str) -> bytes:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            asked.append(path)
        time.sleep(0.002)
        with lock:
            now[0] -= 1
        return cat(path)

    monkeypatch.setattr(type(memory), "cat_file", staticmethod(slow))
    ahead = []
    source = open_source(
        "memory://d", lambda done, total: ahead.append((done, total, len(asked))), scratch
    )
    assert [source.read(i) for i in range(400)] == [JPEGS[i % 7] for i in range(400)]
    assert most[0] > 4
    assert ahead[0] == (256, 400, 256), "no more was fetched than could be written"
