"""Tar files as convert.py writes them and as people have them, beside wds2idx, DALI, GNU tar and webdataset."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import encoded, picture

from pipeline.stores import tfrecord, webdataset
from pipeline.stores.formats import find_format
from pipeline.stores.records import ROW, index_path, save_index, sidecar_path

JPEGS = [encoded(picture(20 + 3 * i, 40 - 2 * i, seed=i), quality=60 + 3 * i) for i in range(9)]
LABELS = [3, -1, 0, 1000, 7, 7, -1, 12, 999_999]


def write(path: Path, format: Any, images: Sequence[bytes] = JPEGS, labels: Sequence[int] = LABELS) -> Path:
    """What convert.py does."""
    with path.open("wb") as file:
        file.write(format.begin(len(images)))
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            before, after = format.frame(file.tell(), key, f"a/{key}.jpg", label, 40 - 2 * key, 20 + 3 * key, image, 0)
            file.write(before + image + after)
        format.finish(file, np.zeros(len(images), dtype=ROW))
    return path


def tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    """What tarfile makes of named members."""
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def opened(path: Path, format: Any = webdataset) -> Any:
    return format.open(path, lambda done, total: None)


def labels_of(store: Any) -> list[Any]:
    return [store.classes[label] if label >= 0 else None for label in store.index["label"]]


def images_of(store: Any) -> list[bytes]:
    return store.read_batch(np.arange(len(store)))


def wds2idx(file: Path) -> str:
    to = file.with_suffix(".theirs")
    subprocess.run([sys.executable, "-m", "wds2idx", file, to], check=True, capture_output=True)
    return to.read_text()


def dalis(file: Path, samples: int) -> list[tuple[bytes, bytes]]:
    """Images and labels as DALI's own reader finds them by the sidecar of a tar."""
    dali = pytest.importorskip("nvidia.dali", reason="needs nvidia-dali", exc_type=ImportError)

    @dali.pipeline_def(batch_size=samples, num_threads=1, device_id=None)
    def reader() -> Any:
        ext = ["jpg;jpeg;webp", "png", "cls"]
        paths = {"paths": [str(file)], "index_paths": [str(sidecar_path(file))]}
        return tuple(dali.fn.readers.webdataset(**paths, ext=ext, case_sensitive_extensions=False))

    columns = [[column.at(i).tobytes() for i in range(samples)] for column in reader().run()]
    return [(jpeg or png, label) for jpeg, png, label in zip(*columns, strict=True)]


# ── what we write ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_a_tar_of_nobody_from_1970(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", webdataset)
    with tarfile.open(file, errorlevel=2) as members:
        found = [(m.name, m.mtime, m.uid, m.gid, m.mode, m.type) for m in members]
        names = [name for name, *_ in found]
        assert {tuple(rest) for _, *rest in found} == {(0, 0, 0, 0o644, tarfile.REGTYPE)}
        assert names[:4] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000002.jpg"]
        data = {name: members.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert [data[f"{key:08d}.jpg"] for key in range(9)] == JPEGS
    assert [int(data.get(f"{key:08d}.cls", b"-1")) for key in range(9)] == LABELS
    assert file.read_bytes() == write(tmp_path / "b.tar", webdataset).read_bytes()
    assert file.stat().st_size % 512 == 0


def test_a_store_of_it_reads_at_random(tmp_path: Path) -> None:
    write(tmp_path / "s-2.tar", webdataset, JPEGS[:5], LABELS[:5])
    write(tmp_path / "s-10.tar", webdataset, JPEGS[5:], LABELS[5:])
    store = pickle.loads(pickle.dumps(opened(tmp_path)))
    order = np.random.default_rng(0).integers(0, 9, 50)
    assert store.read_batch(order) == [JPEGS[i] for i in order]
    assert store.index["label"].tolist() == LABELS
    sizes = list(zip(store.index["width"], store.index["height"], strict=True))
    assert sizes == [(20 + 3 * i, 40 - 2 * i) for i in range(9)]
    assert [store.name(i) for i in (4, 5)] == [
        f"{tmp_path / 's-2.tar'}: 00000004.jpg",
        f"{tmp_path / 's-10.tar'}: 00000000.jpg",
    ]
    assert find_format(tmp_path) == find_format(tmp_path / "s-2.tar") == "webdataset"


def test_the_sidecar_is_that_of_wds2idx_and_dali_reads_by_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", webdataset)
    opened(file)
    assert sidecar_path(file).read_text() == wds2idx(file)
    expected = [(image, b"%d" % label if label >= 0 else b"") for image, label in zip(JPEGS, LABELS, strict=True)]
    assert dalis(file, 9) == expected


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the package's
def test_the_webdataset_package_reads_what_we_write(tmp_path: Path) -> None:
    import webdataset as package

    file = write(tmp_path / "a.tar", webdataset, JPEGS, range(9))
    raw = list(package.WebDataset(str(file), shardshuffle=False).to_tuple("__key__", "jpg", "cls"))
    assert raw == [(f"{key:08d}", JPEGS[key], b"%d" % key) for key in range(9)]
    decoded = list(package.WebDataset(str(file), shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
    assert [(image.size, label) for image, label in decoded] == [((20 + 3 * i, 40 - 2 * i), i) for i in range(9)]


@pytest.mark.parametrize("format", [webdataset, tfrecord], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_million_images_are_opened_at_once_by_their_index(tmp_path: Path, format: ModuleType) -> None:
    count, file = 1_300_000, tmp_path / f"large{format.SUFFIX}"
    rows, step = np.zeros(count, dtype=ROW), 2048
    rows["label"], rows["height"], rows["width"], rows["bytes"] = np.arange(count) % 1000, 40, 20, len(JPEGS[0])
    before, _ = format.frame(0, 1, "a.jpg", 1, 40, 20, JPEGS[0], 0)
    rows["offset"] = np.arange(count) * step + len(before)
    with file.open("wb") as holes:
        holes.truncate(count * step)
        for sample in (0, 777_777, count - 1):
            holes.seek(sample * step)
            holes.write(before + JPEGS[0])
    save_index(index_path(file), [file], rows)
    start = time.perf_counter()
    store = opened(file, format)
    took_s = time.perf_counter() - start
    tracemalloc.start()
    opened(file, format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took_s < 2
    assert peak < 300e6
    assert len(store) == count
    assert store.read_batch(np.array([count - 1, 0, 777_777])) == [JPEGS[0]] * 3


# ── what others write ────────────────────────────────────────────────────────────────────────────────────────────────

LONG = "folder/" * 20 + "n" * 120


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_as_people_have_them(tmp_path: Path, format: int) -> None:
    png = encoded(picture(31, 17), "PNG")
    members = [
        *(("./x/0.JPG", JPEGS[0]), ("./x/0.Cls", b" 12\n"), ("./x/0.txt", b"a dog")),
        *(("../../1.npy", b"\x93NUMPY"), ("../../1.jpeg", JPEGS[1]), ("../../1.cls", b"5")),
        *(("/absolute/2.png", png), ("/absolute/2.jpg", JPEGS[2])),  # the mask comes first
        *(("README", b"no sample"), (".hidden.jpg", JPEGS[8]), ("x/._0.jpg", JPEGS[8]), ("x/3.seg.png", png)),
        *(("x/größer 猫.png", png), ("x/größer 猫.cls", b"0"), ("back\\slash.webp", JPEGS[3])),
        *(("end.", b"no extension"), ("no.image.json", b"{}"), ("empty.jpg", b"")),
    ]
    expected = [(JPEGS[0], b" 12\n"), (JPEGS[1], b"5"), (JPEGS[2], b""), (png, b"0"), (JPEGS[3], b"")]
    if format != tarfile.USTAR_FORMAT:
        members += [(f"{LONG}.jpg", JPEGS[4]), (f"{LONG}.cls", b"1")]
        expected.append((JPEGS[4], b"1"))
    file = tar(tmp_path / "wild.tar", *members, format=format)
    store = opened(file)
    assert images_of(store) == [image for image, _ in expected]
    assert store.index["label"].tolist() == [int(label or b"-1") for _, label in expected]
    assert list(store.rejects) == [f"{file}: empty.jpg"]
    assert store.name(1) == f"{file}: ../../1.jpeg"
    assert sorted(os.listdir(tmp_path)) == ["wild.idx", "wild.tar"]
    samples = int(sidecar_path(file).read_text().split()[1])
    assert [pair for pair in dalis(file, samples) if pair[0]] == expected
    theirs = wds2idx(file).splitlines()
    ours = [line.replace("\\040", " ").replace("\\134", "\\\\") for line in sidecar_path(file).read_text().splitlines()]
    assert [line for line in ours[1:] if LONG not in line] == [
        line for line in theirs[1:] if LONG not in line and "end." not in line
    ]
    with tarfile.open(file) as reread:  # wds2idx takes the long name for the data
        places = {member.name: member.offset_data for member in reread}
    assert [line.split()[1] for line in ours if LONG in line] == [str(places[n]) for n in places if n == f"{LONG}.jpg"]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_links_devices_and_sparse_files_are_passed_over(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEGS[1])
    with (tmp_path / "holes.jpg").open("wb") as holes:
        for i in range(60):  # more of them than a header has room for
            holes.seek(i * 200_000)
            holes.write(JPEGS[0])
    made, options = tmp_path / "made.tar", ["--sparse", "--hole-detection=raw", f"--format={format}"]
    subprocess.run(["tar", "--create", "--file", made, *options, "a.jpg", "holes.jpg"], cwd=tmp_path, check=True)
    with tarfile.open(made, "a") as archive:
        assert archive.getmember("holes.jpg").issparse()
        for number, kind in enumerate((b"1", b"2", b"3", b"4", b"6", b"7", b"V", b"5")):
            special = tarfile.TarInfo(f"special{number}.jpg")
            special.type, special.linkname = kind, "/etc/passwd"
            if kind == b"5":
                special.size = 0o77777  # of which nothing follows
            archive.addfile(special)
        archive.addfile(tarfile.TarInfo("folder.jpg/"))
        last = tarfile.TarInfo("b.jpg")
        last.size = len(JPEGS[2])
        archive.addfile(last, io.BytesIO(JPEGS[2]))
    assert images_of(opened(made)) == JPEGS[1:3]


@pytest.mark.parametrize(
    ("part", "content", "label"),
    [
        ("cls", b"007\n", 7),
        ("cls", b"Egyptian cat\n", "Egyptian cat"),
        ("cls", "größer".encode(), "größer"),
        ("cls", b"", None),
        ("json", json.dumps({"label": 4, "cls": "no"}).encode(), 4),
        ("json", json.dumps({"cls": "dog", "width": 20}).encode(), "dog"),
        *(
            ("json", data, None)
            for data in (b"{}", b"[1]", b"3", b'{"label": true}', b'{"label": [1]}', b"{", b"[" * 9999)
        ),
        ("txt", b"4", None),
    ],
)
def test_labels_come_from_cls_or_json(tmp_path: Path, part: str, content: bytes, label: int | str | None) -> None:
    store = opened(tar(tmp_path / "a.tar", ("0.jpg", JPEGS[0]), (f"0.{part}", content)))
    assert labels_of(store) == [None if label is None else str(label)]


@pytest.mark.parametrize("content", [b"-1", b"2147483648", b"9" * 19, b"\0\1", b"\x80\xff", b"9999999"])
def test_labels_that_cannot_be_cost_the_sample(tmp_path: Path, content: bytes) -> None:
    file = tar(tmp_path / "a.tar", ("0.jpg", JPEGS[0]), ("0.cls", content), ("1.jpg", JPEGS[1]), ("1.cls", b"1"))
    for _ in range(2):  # the second time from the cache
        store = opened(file)
        assert images_of(store) == JPEGS[1:2]
        assert list(store.rejects) == [f"{file}: 0.jpg"]
        assert "its label is" in store.rejects[f"{file}: 0.jpg"]


def test_tars_without_an_image_are_refused_and_one_of_several_is_named(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", ("0.txt", b"text"))
    with pytest.raises(ValueError, match=r"a\.tar holds no image .*none ends in \.jpg, \.jpeg"):
        opened(file)
    tar(tmp_path / "b.tar", ("0.jpg", JPEGS[0]))
    assert list(opened(tmp_path).rejects) == [f"{file}: its members"]


def test_what_a_folder_holds(tmp_path: Path) -> None:
    for name in ("s10.tar", "s9.tar", ".hidden.tar", "s9.idx", "notes.txt", "more.tar.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    assert [file.name for file in webdataset.files(tmp_path)] == ["s9.tar", "s10.tar"]
    assert webdataset.files(tmp_path / "notes.txt") == webdataset.files(tmp_path / "nowhere.tar") == []
    (tmp_path / "packed").mkdir()
    assert webdataset.files(tmp_path / "packed") == []
    (tmp_path / "packed" / "a.tar.gz").touch()
    (tmp_path / "packed" / "b.tgz").touch()
    for path in (tmp_path / "packed", tmp_path / "packed" / "b.tgz"):
        with pytest.raises(ValueError, match=r"(a\.tar\.gz|b\.tgz) is compressed.*unpack"):
            find_format(path)
    (tmp_path / "packed" / "class").mkdir()  # what was left of an archive that is unpacked
    assert find_format(tmp_path / "packed") is None


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_header_or_a_cut_is_named_by_its_place(tmp_path: Path) -> None:
    good = write(tmp_path / "good.tar", webdataset).read_bytes()
    places = {name: good.index(name.encode()) for name in ("00000003.jpg", "00000003.cls")}
    for at in places.values():
        for byte in (0, 100, 124, 130, 150, 156, 300):
            bad = bytearray(good)
            bad[at + byte] ^= 4
            (tmp_path / "bad.tar").write_bytes(bad)
            with pytest.raises(ValueError, match=rf"bad\.tar: no header of a tar at byte {at}: .*damaged"):
                webdataset.scan(tmp_path / "bad.tar")
    ends = (0, 1, 511, 512, places["00000003.jpg"], places["00000003.cls"] + 512, len(good) - 1024, len(good) - 600)
    for end in ends:
        (tmp_path / "cut.tar").write_bytes(good[:end])
        with pytest.raises(ValueError, match=r"cut\.tar.* byte \d+"):
            webdataset.scan(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-0000000001\0", b"000000008\0\0\0"]
)
def test_a_member_may_not_be_larger_than_its_file(tmp_path: Path, size: bytes) -> None:
    file = write(tmp_path / "a.tar", webdataset)
    content = bytearray(file.read_bytes())
    content[124:136], content[148:156] = size, b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: the member at byte 0 has "):
        webdataset.scan(file)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutations_are_refused_or_read_as_bytes(tmp_path: Path, format: int) -> None:
    name = "" if format == tarfile.USTAR_FORMAT else LONG
    members = [(f"{name}{i}.{e}", d) for i in range(3) for e, d in (("jpg", JPEGS[i]), ("cls", b"1"), ("json", b"{}"))]
    mutations_of(tar(tmp_path / "a.tar", *members, format=format), webdataset)


def mutations_of(file: Path, format: Any, count: int = 100) -> None:
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
    assert refused > count // 4
    assert {path.suffix for path in file.parent.iterdir()} <= {file.suffix, ".idx"}
