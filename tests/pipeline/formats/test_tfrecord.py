"""TFRecords written by us and by others, compared with tfrecord2idx, DALI and TensorFlow."""

from __future__ import annotations

import base64
import io
import pickle
import runpy
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from pipeline.formats import EncodedSample, find_format, tfrecord
from pipeline.formats.index import sidecar_path
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

# Two Examples that TensorFlow 2.21 wrote: a PNG of 3 x 2 pixels of (200, 30, 90), the labels 300
# and 0, and other features.
WRITTEN_BY_TENSORFLOW = zlib.decompress(
    base64.b85decode(
        "c-lL~00C>x3m@e=&d4RrC779;n4YSioRe5wte=yZl$s;NCdI<Vw1x>NDS#|ll3GzB#LmUa#hjd2!j;U$3z1CCOU_S8O%V#>3gGhV4DfU3<&xq8"
        "TEXk-;SvO-nSq#zg9%6qiGB11Qlg$Njv*Cul5G^lj~)PnBS1ysT8u77;ukA}T<7WP=d#Wzp@~b4OAKO3eo|Iya*2LYQhtSgMQ&!E5RVWS7Y74F"
        "gB?)0{iBE_hiafcJNfwd39c$GJ}y>>XIQ0}xfmI^xVhN#@=G!@^U{SFxT3jO!N$_U&C_LctpN&>TK)"
    )
)


# Protobuf messages, by their specification: others may write features of any kind in any order.


def varint(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def message(number: int, *content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(b"".join(content))) + b"".join(content)


def feature(key: str, kind: int, *values: bytes) -> bytes:
    return message(1, message(1, key.encode()), message(2, message(kind, *values)))


def texts(key: str, *values: bytes) -> bytes:
    return feature(key, 1, *(message(1, value) for value in values))


def packed(key: str, *values: int) -> bytes:
    return feature(key, 3, message(1, *map(varint, values)))


def unpacked(key: str, *values: int) -> bytes:
    return feature(key, 3, *(b"\x08" + varint(value) for value in values))


def example(*features: bytes) -> bytes:
    return message(1, *features)


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return ((((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def record(data: bytes) -> bytes:
    length = len(data).to_bytes(8, "little")
    return length + masked(length) + data + masked(data)


def tfrecords(path: Path, examples: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(map(record, examples)))
    return path


def tfrecord2idx_sidecar(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sidecar that DALI's tfrecord2idx writes for a file."""
    import_or_skip("nvidia.dali")
    sidecar = file.with_name("theirs")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # it is optional, and slow
    monkeypatch.setattr(sys, "argv", ["tfrecord2idx", str(file), str(sidecar)])
    runpy.run_path(str(Path(sys.executable).with_name("tfrecord2idx")))
    return sidecar.read_text()


def read_with_dali(files: list[Path], keys: dict[str, type], samples: int) -> dict[str, list[Any]]:
    """The values that DALI's own reader finds, by the sidecars.

    For a key that is missing, it returns whatever the memory holds.
    """
    dali, kinds = import_or_skip("nvidia.dali"), import_or_skip("nvidia.dali.tfrecord")
    kind = {bytes: (kinds.string, ""), int: (kinds.int64, -1)}
    features = {key: kinds.FixedLenFeature((), *kind[keys[key]]) for key in keys}

    @dali.pipeline_def(batch_size=samples, num_threads=1, device_id=None)
    def reader() -> Any:
        paths = {
            "path": [str(f) for f in files],
            "index_path": [str(sidecar_path(f)) for f in files],
        }
        read = dali.fn.readers.tfrecord(**paths, features=features)
        return tuple(read[key] for key in keys)

    columns = {
        key: map(column.at, range(samples))
        for key, column in zip(keys, reader().run(), strict=True)
    }
    return {
        key: [i.item() if keys[key] is int else i.tobytes() for i in column]
        for key, column in columns.items()
    }


# What we write


@pytest.mark.parametrize("labelled", [True, False])
def test_dali_reads_every_key_of_what_we_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    labels = [abs(label) if labelled else -1 for label in LABELS]
    files = []
    for i, part in enumerate((slice(0, 4), slice(4, 9))):
        path = tmp_path / f"x-{i:05d}-of-00002.tfrecord"
        files.append(write_records(path, tfrecord, JPEGS[part], labels[part]))
    open_records(tmp_path, tfrecord)
    for file in files:
        assert sidecar_path(file).read_text() == tfrecord2idx_sidecar(file, monkeypatch)
    expected: dict[str, list[Any]] = {
        "image/encoded": JPEGS,
        "image/format": [b"JPEG"] * 9,
        "image/height": [height for _, height in SIZES],
        "image/width": [width for width, _ in SIZES],
        "image/filename": [b"a/%d.jpg" % i for i in (0, 1, 2, 3, 0, 1, 2, 3, 4)],
    }
    if labelled:
        expected["image/class/label"] = labels
    assert (
        read_with_dali(files, {key: type(values[0]) for key, values in expected.items()}, 9)
        == expected
    )


def test_a_store_reads_at_random(tmp_path: Path) -> None:
    for i, part in enumerate((slice(0, 5), slice(5, 9))):
        path = tmp_path / f"train.tfrecord-{i:05d}-of-00002"
        write_records(path, tfrecord, JPEGS[part], LABELS[part])
    store = pickle.loads(pickle.dumps(open_records(tmp_path, tfrecord)))
    order = np.random.default_rng(0).integers(0, 9, 50)
    assert store.read_batch(order) == [JPEGS[i] for i in order]
    assert store.index["label"].tolist() == LABELS
    assert list(zip(store.index["width"], store.index["height"], strict=True)) == SIZES
    assert f"train.tfrecord-00001-of-00002, byte {store.index['offset'][5]}" in store.name(5)
    assert find_format(tmp_path) == "tfrecord"
    assert find_format(tmp_path / "train.tfrecord-00000-of-00002") == "tfrecord"
    sidecars = [f"train.tfrecord-{i:05d}-of-00002.idx" for i in range(2)]
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == sidecars


@pytest.mark.parametrize("size", [1, 100, 127, 128, 16_000, 16_383, 16_384, 3_000_000])
def test_images_of_any_length_are_framed_right(tmp_path: Path, size: int) -> None:
    """The record is the one that the specification of protobuf gives."""
    image = bytes(size)
    name = "é" * (size % 200) + ".jpg"
    sample = EncodedSample(0, name, size, size, 2 * size, image, checksum=0)
    before, after = tfrecord.frame(0, sample)
    features = [
        packed("image/height", size),
        packed("image/width", 2 * size),
        packed("image/class/label", size),
    ]
    features += [
        texts("image/format", b"JPEG"),
        texts("image/filename", name.encode()),
        texts("image/encoded", image),
    ]
    assert before + image + after == record(example(*features))


# What others write


def test_a_file_that_tensorflow_wrote_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.tfrecord"
    file.write_bytes(WRITTEN_BY_TENSORFLOW)
    store = open_records(file, tfrecord)
    assert store.index["label"].tolist() == [300, 0]
    for image in images_of(store):
        assert Image.open(io.BytesIO(image)).getpixel((2, 1)) == (200, 30, 90)


IMAGE = texts("image/encoded", JPEGS[0])


@pytest.mark.parametrize(
    ("features", "label"),
    [
        ([IMAGE, packed("image/class/label", 5)], "5"),
        ([unpacked("image/class/label", 500), IMAGE], "500"),
        ([unpacked("label", 3, 4), texts("image", JPEGS[0])], "3"),
        ([texts("label", b"Egyptian cat\n"), texts("jpg", JPEGS[0])], "Egyptian cat"),
        ([texts("image_raw", JPEGS[0]), texts("label", "größer".encode())], "größer"),
        (
            [packed("label", 9), packed("image/class/label", 2), texts("image", JPEGS[1]), IMAGE],
            "2",
        ),
        ([packed("label"), feature("image/class/label", 3), IMAGE], None),  # lists of nothing
        ([texts("label", b""), texts("image/encoded"), texts("image", JPEGS[0])], None),
        ([feature("label", 2, message(1, bytes(4))), IMAGE], None),  # floats
        ([texts("image/encoded", JPEGS[0], JPEGS[1]), packed("labels", 4)], None),
        (
            [message(1, message(2, message(3, message(1, b"\7"))), message(1, b"label")), IMAGE],
            "7",
        ),  # the value first
        (
            [
                varint(2 * 8) + varint(99),
                varint(3 * 8 + 1) + bytes(8),
                varint(4 * 8 + 5) + bytes(4),
                IMAGE,
            ],
            None,
        ),
        ([message(700, b"unknown"), IMAGE, message(1), packed("other", *range(0, 9999, 7))], None),
    ],
)
def test_examples_that_others_write_are_read(
    tmp_path: Path, features: list[bytes], label: str | None
) -> None:
    later = message(2, message(1, b"lists of a SequenceExample"))
    split = b"".join(message(1, feature) for feature in features)  # fields of one number are merged
    for i, data in enumerate((example(*features) + later, later + split)):
        store = open_records(tfrecords(tmp_path / f"{i}.tfrecords", [data]), tfrecord)
        assert images_of(store) == JPEGS[:1]
        assert [
            store.classes[number] if number >= 0 else None for number in store.index["label"]
        ] == [label]


def test_files_of_a_folder_are_found_and_sorted(tmp_path: Path) -> None:
    names = ["a9.tfrecords", "a10.tfrecords", "a.tfrecord", "t-00000-of-00002", "t-00001-of-00002"]
    for name in [
        *names[::-1],
        ".b.tfrecord",
        "a.idx",
        "t-00000-of-00002.idx",
        "a.tfrecord.txt",
        "t-0-of-2",
    ]:
        (tmp_path / name).touch()
    (tmp_path / "folder.tfrecord").mkdir()
    assert [file.name for file in tfrecord.files(tmp_path)] == names
    assert tfrecord.files(tmp_path / "a.idx") == tfrecord.files(tmp_path / "b.tfrecord") == []


@pytest.mark.parametrize(
    "form", ["t-%s-of-00012", "t.tfrecord-%s-of-00012", "t-%s-of-00012.tfrecord"]
)
def test_missing_shards_are_named(tmp_path: Path, form: str) -> None:
    for i in range(12):
        (tmp_path / (form % f"{i:05d}")).touch()
    assert len(tfrecord.files(tmp_path)) == 12
    for i in (11, 3):
        (tmp_path / (form % f"{i:05d}")).unlink()
        with pytest.raises(ValueError, match=f"lacks {form % f'{i:05d}'}: restore"):
            find_format(tmp_path)
    assert find_format(tmp_path / (form % "00004")) == "tfrecord"


# Damage


def test_damaged_data_reject_one_record(tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.tfrecord", tfrecord)
    clean = open_records(file, tfrecord)
    data = bytearray(file.read_bytes())
    data[clean.index["offset"][3] + 50] ^= 1
    file.write_bytes(data)
    store = open_records(file, tfrecord)
    assert images_of(store) == JPEGS[:3] + JPEGS[4:]
    at = sidecar_path(file).read_text().splitlines()[3].split()[0]
    assert store.rejects == {f"record at byte {at}": "damaged: its checksum is wrong"}


def test_records_without_an_image_are_left_out_with_the_reason(tmp_path: Path) -> None:
    image = texts("image", JPEGS[0])
    bad = {
        b"": "holds no image",
        example(packed("label", 3)): "holds no image",
        example(packed("image", 3)): "holds no image",
        example(texts("image", bytes(300))): "not a JPEG",
        b"no protobuf at all": "not a tf.train.Example",
        example(image)[:-1]: "not a tf.train.Example",
        varint(8 + 3) + example(image): "not a tf.train.Example",  # a group
        b"\xff" * 20: "not a tf.train.Example",
        example(image, packed("label", 2**64 - 2)): "label is -2",
        example(image, packed("label", 2**31)): "label is 2147483648",
        example(image, texts("label", b"\0\1")): "label is ",
    }
    file = tfrecords(tmp_path / "a.tfrecord", [*bad, example(image)])
    for _ in range(2):  # the second time from the cache
        store = open_records(file, tfrecord)
        assert images_of(store) == JPEGS[:1]
        reasons = sorted(store.rejects.items(), key=lambda item: int(item[0].split()[-1]))
        assert len(reasons) == len(bad)
        for (_, reason), expected in zip(reasons, bad.values(), strict=True):
            assert expected in reason


def test_a_damaged_length_or_a_cut_is_reported_with_its_place(tmp_path: Path) -> None:
    good = write_records(tmp_path / "good.tfrecord", tfrecord).read_bytes()
    starts = [
        int(line.split()[0])
        for line in tfrecord.scan(tmp_path / "good.tfrecord").sidecar.splitlines()
    ]
    bad = tmp_path / "bad.tfrecord"
    for byte in range(12):
        data = bytearray(good)
        data[starts[3] + byte] ^= 16
        bad.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"bad\.tfrecord: no record begins at byte {starts[3]}: it is damaged"
        ):
            tfrecord.scan(bad)
    for end in (
        1,
        11,
        12,
        starts[3] - 1,
        starts[3] + 5,
        starts[3] + 12,
        starts[3] + 500,
        len(good) - 1,
    ):
        bad.write_bytes(good[:end])
        with pytest.raises(ValueError, match=r"bad\.tfrecord.* byte \d+"):
            tfrecord.scan(bad)
    for length in (1, 2**40, 2**63, 2**64 - 1):
        header = length.to_bytes(8, "little")
        bad.write_bytes(good + header + masked(header))
        with pytest.raises(
            ValueError, match=rf"bad\.tfrecord: the record at byte {len(good)} has {length} bytes"
        ):
            tfrecord.scan(bad)


def test_random_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    examples = [
        example(texts("image", encoded(picture(9, 9, i))), unpacked("label", 300 + i))
        for i in range(5)
    ]
    check_damaged_copies(tfrecords(tmp_path / "a.tfrecord", examples), tfrecord)


def test_random_damage_under_right_checksums_rejects_records_or_does_no_harm(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    good = example(texts("image", encoded(picture(9, 9))), packed("label", 300, 2))
    examples = []
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, 60, 1 + rng.integers(3)):
            data[at] = rng.integers(256)
        examples.append(bytes(data[: len(good) - rng.integers(2)]))
    store = open_records(tfrecords(tmp_path / "a.tfrecord", examples), tfrecord)
    assert len(store) + len(store.rejects) == 300
    assert 20 < len(store) < 280
    assert all(images_of(store))


def test_two_sets_of_shards_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        write_records(tmp_path / name, tfrecord, [encoded(picture(20, 20))], [0])
    with pytest.raises(ValueError, match="holds train and validation: give each its own folder"):
        open_records(tmp_path, tfrecord)
