"""Tar files written by us and by others, compared with wds2idx, DALI, GNU tar and webdataset."""

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
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pipeline.formats import EncodedSample, find_format, tfrecord, webdataset
from pipeline.formats.index import ROW, index_path, save_index, sidecar_path
from tests.helpers.images import encoded, picture
from tests.helpers.libraries import import_or_skip
from tests.helpers.records import (
    JPEGS,
    LABELS,
    SIZES,
    check_damaged_copies,
    images_of,
    open_records,
    write_records,
)


def tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write named members with tarfile."""
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def labels_of(store: Any) -> list[Any]:
    return [store.classes[label] if label >= 0 else None for label in store.index["label"]]


def wds2idx_sidecar(file: Path) -> str:
    """The sidecar that DALI's wds2idx writes for a tar."""
    import_or_skip("wds2idx")
    sidecar = file.with_suffix(".theirs")
    command = [sys.executable, "-m", "wds2idx", file, sidecar]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return sidecar.read_text()


def read_with_dali(file: Path, samples: int) -> list[tuple[bytes, bytes]]:
    """Images and labels as DALI's own reader finds them, by the sidecar of a tar."""
    dali = import_or_skip("nvidia.dali")

    @dali.pipeline_def(batch_size=samples, num_threads=1, device_id=None)
    def reader() -> Any:
        ext = ["jpg;jpeg;webp;bmp", "png", "cls"]
        paths = {"paths": [str(file)], "index_paths": [str(sidecar_path(file))]}
        return tuple(dali.fn.readers.webdataset(**paths, ext=ext, case_sensitive_extensions=False))

    columns = [[column.at(i).tobytes() for i in range(samples)] for column in reader().run()]
    return [(jpeg or png, label) for jpeg, png, label in zip(*columns, strict=True)]


# What we write


def test_a_written_tar_has_no_owner_and_is_from_1970(tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.tar", webdataset)
    with tarfile.open(file, errorlevel=2) as members:
        names = members.getnames()
        headers = {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members}
        assert headers == {(0, 0, 0, 0o644, tarfile.REGTYPE)}
        assert names[:4] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000002.jpg"]
        data = {name: members.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert [data[f"{key:08d}.jpg"] for key in range(9)] == JPEGS
    assert [int(data.get(f"{key:08d}.cls", b"-1")) for key in range(9)] == LABELS
    assert file.read_bytes() == write_records(tmp_path / "b.tar", webdataset).read_bytes()
    assert file.stat().st_size % 512 == 0


def test_a_store_reads_at_random(tmp_path: Path) -> None:
    write_records(tmp_path / "s-2.tar", webdataset, JPEGS[:5], LABELS[:5])
    write_records(tmp_path / "s-10.tar", webdataset, JPEGS[5:], LABELS[5:])
    store = pickle.loads(pickle.dumps(open_records(tmp_path, webdataset)))
    order = np.random.default_rng(0).integers(0, 9, 50)
    assert store.read_batch(order) == [JPEGS[i] for i in order]
    assert store.index["label"].tolist() == LABELS
    assert list(zip(store.index["width"], store.index["height"], strict=True)) == SIZES
    assert [store.name(i) for i in (4, 5)] == [
        f"{tmp_path / 's-2.tar'}: 00000004.jpg",
        f"{tmp_path / 's-10.tar'}: 00000000.jpg",
    ]
    assert find_format(tmp_path) == find_format(tmp_path / "s-2.tar") == "webdataset"


def test_the_sidecar_is_that_of_wds2idx_and_dali_can_use_it(tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.tar", webdataset)
    open_records(file, webdataset)
    assert sidecar_path(file).read_text() == wds2idx_sidecar(file)
    expected = [
        (image, b"%d" % label if label >= 0 else b"")
        for image, label in zip(JPEGS, LABELS, strict=True)
    ]
    assert read_with_dali(file, 9) == expected


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # in the package
def test_the_webdataset_package_reads_what_we_write(tmp_path: Path) -> None:
    package = import_or_skip("webdataset")
    file = write_records(tmp_path / "a.tar", webdataset, JPEGS, range(9))
    raw = list(package.WebDataset(str(file), shardshuffle=False).to_tuple("__key__", "jpg", "cls"))
    assert raw == [(f"{key:08d}", JPEGS[key], b"%d" % key) for key in range(9)]
    decoded = list(
        package.WebDataset(str(file), shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    )
    assert [(image.size, label) for image, label in decoded] == list(
        zip(SIZES, range(9), strict=True)
    )


@pytest.mark.parametrize(
    "format", [webdataset, tfrecord], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_a_million_images_are_opened_in_two_seconds(tmp_path: Path, format: ModuleType) -> None:
    count = 1_300_000
    step = 2048  # bytes from one sample to the next
    file = tmp_path / f"large{format.SUFFIX}"
    rows = np.zeros(count, dtype=ROW)
    rows["label"] = np.arange(count) % 1000
    rows["height"] = 40
    rows["width"] = 20
    rows["bytes"] = len(JPEGS[0])
    before, _ = format.frame(0, EncodedSample(1, "a.jpg", 1, 40, 20, JPEGS[0], checksum=0))
    rows["offset"] = np.arange(count) * step + len(before)
    with file.open("wb") as holes:
        holes.truncate(count * step)
        for sample in (0, 777_777, count - 1):
            holes.seek(sample * step)
            holes.write(before + JPEGS[0])
    save_index(index_path(file), [file], rows)
    began = time.perf_counter()
    store = open_records(file, format)
    seconds = time.perf_counter() - began
    tracemalloc.start()
    open_records(file, format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 300e6
    assert len(store) == count
    assert store.read_batch(np.array([count - 1, 0, 777_777])) == [JPEGS[0]] * 3


# What others write

LONG = "folder/" * 20 + "n" * 120
DEEP = "deep/" * 22 + "4.bmp"  # fits into a ustar header, in two parts


TAR_FORMATS = pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)

PNG = encoded(picture(31, 17), "PNG")
BMP = encoded(picture(8, 9), "BMP")
MEMBERS_OF_OTHERS = [
    ("./x/0.JPG", JPEGS[0]),
    ("./x/0.Cls", b" 12\n"),
    ("./x/0.txt", b"a dog"),
    ("../../1.npy", b"\x93NUMPY"),
    ("../../1.jpeg", JPEGS[1]),
    ("../../1.cls", b"5"),
    ("/absolute/2.png", PNG),  # a mask, before the image
    ("/absolute/2.jpg", JPEGS[2]),
    ("README", b"not a sample"),
    (".hidden.jpg", JPEGS[8]),
    ("x/._0.jpg", JPEGS[8]),
    ("x/3.seg.png", PNG),
    ("x/größer 猫.png", PNG),
    ("x/größer 猫.cls", b"0"),
    ("back\\slash.webp", JPEGS[3]),
    (DEEP, BMP),
    ("end.", b"no extension"),
    ("no.image.json", b"{}"),
    ("Empty.JPG", b""),
]
LONG_MEMBERS = [(f"{LONG}.jpg", JPEGS[4]), (f"{LONG}.cls", b"1")]  # do not fit into ustar
SAMPLES_OF_OTHERS = [  # name, image, label
    ("./x/0.JPG", JPEGS[0], b" 12\n"),
    ("../../1.jpeg", JPEGS[1], b"5"),
    ("/absolute/2.jpg", JPEGS[2], b""),
    ("x/größer 猫.png", PNG, b"0"),
    ("back\\slash.webp", JPEGS[3], b""),
    (DEEP, BMP, b""),
]
LONG_SAMPLE = (f"{LONG}.jpg", JPEGS[4], b"1")


def tar_of_others(path: Path, format: int) -> tuple[Path, list[tuple[str, bytes, bytes]]]:
    """A tar as others write it, and the samples in it."""
    if format == tarfile.USTAR_FORMAT:
        return tar(path, *MEMBERS_OF_OTHERS, format=format), SAMPLES_OF_OTHERS
    members = [*LONG_MEMBERS, *MEMBERS_OF_OTHERS]
    return tar(path, *members, format=format), [LONG_SAMPLE, *SAMPLES_OF_OTHERS]


@TAR_FORMATS
def test_tars_that_others_write_are_read(tmp_path: Path, format: int) -> None:
    file, samples = tar_of_others(tmp_path / "others.tar", format)
    store = open_records(file, webdataset)
    assert images_of(store) == [image for _, image, _ in samples]
    assert store.index["label"].tolist() == [int(label or b"-1") for *_, label in samples]
    assert list(store.rejects) == ["Empty.JPG"]
    names = [name for name, *_ in samples]
    assert [image.name for image in webdataset.scan(file).images] == [*names, "Empty.JPG"]
    for i, name in enumerate(names):
        if len(name) < 100 and name.isascii():  # other names are not in the header
            assert store.name(i) == f"{file}: {name}"
    assert sorted(os.listdir(tmp_path)) == ["others.idx", "others.tar"]


@TAR_FORMATS
def test_sidecars_of_tars_that_others_write_are_right(tmp_path: Path, format: int) -> None:
    file, samples = tar_of_others(tmp_path / "others.tar", format)
    open_records(file, webdataset)
    lines = sidecar_path(file).read_text().splitlines()
    count = int(lines[0].split()[1])
    assert [pair for pair in read_with_dali(file, count) if pair[0]] == [
        (image, label) for _, image, label in samples
    ]
    ours = [line.replace("\\040", " ").replace("\\134", "\\\\") for line in lines]
    theirs = [line for line in wds2idx_sidecar(file).splitlines() if "end." not in line]
    if format == tarfile.GNU_FORMAT:  # wds2idx takes a long name for a file
        ours = [line for line in ours if LONG not in line and DEEP not in line]
        theirs = [line for line in theirs if LONG not in line and DEEP not in line]
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_links_devices_and_sparse_files_are_skipped(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEGS[1])
    with (tmp_path / "holes.jpg").open("wb") as holes:
        for i in range(60):  # more holes than a header has room for
            holes.seek(i * 200_000)
            holes.write(JPEGS[0])
    made = tmp_path / "made.tar"
    options = ["--sparse", "--hole-detection=raw", f"--format={format}"]
    command = ["tar", "--create", "--file", made, *options, "a.jpg", "holes.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with tarfile.open(made, "a") as archive:
        assert archive.getmember("holes.jpg").issparse()
        for number, kind in enumerate((b"1", b"2", b"3", b"4", b"6", b"7", b"V", b"5")):
            special = tarfile.TarInfo(f"special{number}.jpg")
            special.type = kind
            special.linkname = "/etc/passwd"
            if kind == b"5":
                special.size = 0o77777  # which a folder's header may claim
            archive.addfile(special)
        archive.addfile(tarfile.TarInfo("folder.jpg/"))
        last = tarfile.TarInfo("b.jpg")
        last.size = len(JPEGS[2])
        archive.addfile(last, io.BytesIO(JPEGS[2]))
    store = open_records(made, webdataset)
    assert images_of(store) == JPEGS[1:3]
    assert store.rejects == {}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_eight_gibibytes_are_found(tmp_path: Path, format: int) -> None:
    """Their sizes do not fit into the octal digits of a header."""
    file = tmp_path / "a.tar"
    with file.open("wb") as holes:
        for name, size, data in (
            ("a.npy", 9 << 30, b""),
            ("0.jpg", 3 << 30, JPEGS[0]),
            ("1.jpg", 0, JPEGS[1]),
        ):
            member = tarfile.TarInfo(name)
            member.size = size or len(data)
            holes.write(member.tobuf(format))
            start = holes.tell()
            holes.write(data)
            holes.seek(start - -member.size // 512 * 512)
        holes.write(bytes(1024))
    store = open_records(file, webdataset)
    assert store.index["offset"][0] > 12 << 30
    assert images_of(store) == JPEGS[1:2]
    assert store.rejects == {"0.jpg": f"it has {3 << 30:,} bytes (the limit is 2 GiB)"}


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
            for data in (
                b"{}",
                b"[1]",
                b"3",
                b'{"label": true}',
                b'{"label": [1]}',
                b"{",
                b"[" * 9999,
            )
        ),
        ("txt", b"4", None),
    ],
)
def test_labels_come_from_cls_or_json(
    tmp_path: Path, part: str, content: bytes, label: int | str | None
) -> None:
    store = open_records(
        tar(tmp_path / "a.tar", ("0.jpg", JPEGS[0]), (f"0.{part}", content)), webdataset
    )
    assert labels_of(store) == [None if label is None else str(label)]


@pytest.mark.parametrize(
    "content", [b"-2", b"2147483648", b"9" * 19, b"9" * 5000, b"\0\1", b"\x80\xff", b"9999999"]
)
def test_samples_with_an_impossible_label_are_left_out(tmp_path: Path, content: bytes) -> None:
    file = tar(
        tmp_path / "a.tar",
        ("0.jpg", JPEGS[0]),
        ("0.cls", content),
        ("1.jpg", JPEGS[1]),
        ("1.cls", b"1"),
    )
    for _ in range(2):  # the second time from the cache
        store = open_records(file, webdataset)
        assert images_of(store) == JPEGS[1:2]
        assert list(store.rejects) == ["0.jpg"]
        assert "its label is" in store.rejects["0.jpg"]


def test_a_tar_without_an_image_is_refused_but_left_out_beside_others(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", ("0.txt", b"text"))
    with pytest.raises(ValueError, match=r"a\.tar holds no image .*none ends in \.jpg, \.jpeg"):
        open_records(file, webdataset)
    tar(tmp_path / "b.tar", ("0.jpg", JPEGS[0]))
    assert list(open_records(tmp_path, webdataset).rejects) == [f"{file.name}: its members"]


def test_files_of_a_folder_are_found_and_sorted(tmp_path: Path) -> None:
    for name in ("s10.tar", "s9.tar", ".hidden.tar", "s9.idx", "notes.txt", "more.tar.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    assert [file.name for file in webdataset.files(tmp_path)] == ["s9.tar", "s10.tar"]
    assert (
        webdataset.files(tmp_path / "notes.txt") == webdataset.files(tmp_path / "nowhere.tar") == []
    )
    (tmp_path / "packed").mkdir()
    assert webdataset.files(tmp_path / "packed") == []
    (tmp_path / "packed" / "a.tar.gz").touch()
    (tmp_path / "packed" / "b.tgz").touch()
    for path in (tmp_path / "packed", tmp_path / "packed" / "b.tgz"):
        with pytest.raises(ValueError, match=r"(a\.tar\.gz|b\.tgz) is compressed.*unpack"):
            find_format(path)
    (tmp_path / "packed" / "class").mkdir()  # the archives were unpacked, and kept
    assert find_format(tmp_path / "packed") is None


# Damage


def test_a_damaged_header_or_a_cut_is_reported_with_its_place(tmp_path: Path) -> None:
    good = write_records(tmp_path / "good.tar", webdataset).read_bytes()
    places = {name: good.index(name.encode()) for name in ("00000003.jpg", "00000003.cls")}
    for at in places.values():
        for byte in (0, 100, 124, 130, 150, 156, 300):
            bad = bytearray(good)
            bad[at + byte] ^= 4
            (tmp_path / "bad.tar").write_bytes(bad)
            with pytest.raises(
                ValueError, match=rf"bad\.tar: no header of a tar at byte {at}: .*damaged"
            ):
                webdataset.scan(tmp_path / "bad.tar")
    ends = (
        0,
        1,
        511,
        512,
        places["00000003.jpg"],
        places["00000003.cls"] + 512,
        len(good) - 1024,
        len(good) - 600,
    )
    for end in ends:
        (tmp_path / "cut.tar").write_bytes(good[:end])
        with pytest.raises(ValueError, match=r"cut\.tar.* byte \d+"):
            webdataset.scan(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-0000000001\0", b"000000008\0\0\0"],
)
def test_a_member_may_not_be_larger_than_its_file(tmp_path: Path, size: bytes) -> None:
    file = write_records(tmp_path / "a.tar", webdataset)
    content = bytearray(file.read_bytes())
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: the member at byte 0 has "):
        webdataset.scan(file)


@TAR_FORMATS
def test_random_damage_is_refused_or_does_no_harm(tmp_path: Path, format: int) -> None:
    name = "" if format == tarfile.USTAR_FORMAT else LONG
    members = []
    for i in range(3):
        parts = {"jpg": JPEGS[i], "cls": b"1", "json": b"{}"}
        members += [(f"{name}{i}.{extension}", data) for extension, data in parts.items()]
    check_damaged_copies(tar(tmp_path / "a.tar", *members, format=format), webdataset)
