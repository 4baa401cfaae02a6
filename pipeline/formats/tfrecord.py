"""TFRecord: records of `tf.train.Example`, with the keys that image data sets in it commonly have.

Both layers are small enough to be written and read here. A record is a length and its data, each
with a checksum. An Example is a protobuf message:

    Example {1: Features {1: entry {1: key, 2: Feature {1: bytes | 2: floats | 3: int64s}}, ...}}
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
from numpy.typing import NDArray

from ..stores import Progress
from .format import EncodedSample
from .record_store import RecordStore, natural_key, open_files
from .scanning import Label, Scan, ScannedImage

SUFFIX = ".tfrecord"
SHARDED = True

_IMAGE_KEYS = (b"image/encoded", b"image", b"image_raw", b"jpg")  # the first that is there is read
_LABEL_KEYS = (b"image/class/label", b"label")
_BYTES = 1  # kinds of features, as the numbers of their fields
_INTEGERS = 3

_NAME = re.compile(r"[^.].*(\.tfrecords?|-\d{5}-of-\d{5})")
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*)")

_START_BYTES = 12  # of a record before its data: the length (8) and its checksum (4)
_FRAME_BYTES = 16  # of a record besides its data: the start, and the checksum of the data (4)

# The wire types of protobuf fields.
_VARINT = 0
_LENGTH_DELIMITED = 2
_FIXED_SIZES = {1: 8, 5: 4}  # wire type -> bytes

_NOT_AN_EXAMPLE = "it is not a tf.train.Example"

_Span = tuple[int, int]  # where something begins and ends in the data of a record
_Features = dict[tuple[bytes, int], _Span]  # (key, kind) -> the first value


# Writing


def begin(samples: int) -> bytes:
    return b""


def frame(offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
    numbers = {
        b"image/height": sample.height,
        b"image/width": sample.width,
        b"image/class/label": sample.label,
    }
    texts = {b"image/format": b"JPEG", b"image/filename": os.fsencode(sample.name)}
    entries = [
        _entry(key, _INTEGERS, _varint(number)) for key, number in numbers.items() if number >= 0
    ]
    entries += [_entry(key, _BYTES, text) for key, text in texts.items()]

    # The image is the last value, so that all other bytes of the Example come before it.
    image_size = len(sample.image)
    image_entry = _entry(b"image/encoded", _BYTES, b"", to_follow=image_size)
    example = _field(1, b"".join(entries) + image_entry, to_follow=image_size)

    length = (len(example) + image_size).to_bytes(8, "little")
    before = length + _masked(google_crc32c.value(length)) + example
    checksum = google_crc32c.extend(google_crc32c.value(example), sample.image)
    return before, _masked(checksum)


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    pass


def _entry(key: bytes, kind: int, value: bytes, to_follow: int = 0) -> bytes:
    """An entry of the table of features, with one value.

    Its last `to_follow` bytes are not in `value`: they are written after the entry.
    """
    feature = _field(kind, _field(1, value, to_follow), to_follow)
    return _field(1, _field(1, key) + _field(2, feature, to_follow), to_follow)


def _field(number: int, content: bytes, to_follow: int = 0) -> bytes:
    tag = number << 3 | _LENGTH_DELIMITED
    return bytes([tag]) + _varint(len(content) + to_follow) + content


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first; all bytes but the last have bit 7 set."""
    if value < 128:
        return bytes([value])
    return bytes([value % 128 + 128]) + _varint(value // 128)


def _masked(crc: int) -> bytes:
    """A checksum as it is stored: rotated, as checksums of data with checksums are weak."""
    rotated = crc >> 15 | crc << 17
    return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# Reading


def open(path: Path, progress: Progress) -> RecordStore:
    return open_files(path, files(path), scan, progress)


def files(path: Path) -> list[Path]:
    """The TFRecord files at `path`.

    Raises:
        ValueError: Shards are missing (a name like `train-00003-of-00010` implies nine others), or
            there are two sets of shards.
    """
    if not path.is_dir():
        return [path] if path.is_file() and _NAME.fullmatch(path.name) else []
    present = [
        path / name
        for name in os.listdir(path)
        if _NAME.fullmatch(name) and (path / name).is_file()
    ]
    _check_shards(path, [file.name for file in present])
    return sorted(present, key=natural_key)


def _check_shards(path: Path, names: list[str]) -> None:
    numbers_of: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        shard = _SHARD.fullmatch(name)
        if shard:
            shard_set = (shard["before"], shard["count"], shard["after"])
            numbers_of.setdefault(shard_set, set()).add(int(shard["number"]))
    if len(numbers_of) > 1:
        sets = sorted(before for before, _, _ in numbers_of)
        raise ValueError(f"{path} holds {' and '.join(sets)}: give each its own folder")
    for (before, count, after), numbers in numbers_of.items():
        missing = sorted(set(range(int(count))) - numbers)
        if missing:
            name = f"{before}-{missing[0]:0{len(count)}}-of-{count}{after}"
            raise ValueError(
                f"{path} lacks {name}: restore it, or name single files to use them alone"
            )


class _Record(NamedTuple):
    offset: int
    data: bytes
    is_intact: bool  # whether the checksum of the data is right


def scan(file: Path) -> Scan:
    """List the images of a file; the sidecar is what DALI's tfrecord2idx writes."""
    images: list[ScannedImage] = []
    lines: list[str] = []
    rejects: dict[str, str] = {}
    for record in _read_records(file):
        lines.append(f"{record.offset} {len(record.data) + _FRAME_BYTES}\n")
        name = f"record at byte {record.offset}"
        try:
            images.append(_find_image(name, record))
        except ValueError as error:
            rejects[name] = str(error)
    return Scan(images, "".join(lines), rejects)


def _find_image(name: str, record: _Record) -> ScannedImage:
    """Find the image in a record. Raises ValueError if there is none."""
    if not record.is_intact:
        raise ValueError("damaged: its checksum is wrong")
    features = _read_features(record.data)
    for key in _IMAGE_KEYS:
        if (key, _BYTES) in features:
            start, end = features[key, _BYTES]
            offset = record.offset + _START_BYTES + start
            return ScannedImage(name, offset, end - start, _read_label(record.data, features))
    keys = ", ".join(key.decode() for key in _IMAGE_KEYS)
    raise ValueError(f"it holds no image: none of {keys}")


def _read_records(file: Path) -> Iterator[_Record]:
    """The records of a file. Raises ValueError if the next one cannot be found."""
    offset = 0
    end = file.stat().st_size
    with file.open("rb") as opened:
        while offset < end:
            length = opened.read(8)
            checksum = opened.read(4)
            if _masked(google_crc32c.value(length)) != checksum:
                raise ValueError(
                    f"{file}: no record begins at byte {offset}: "
                    "it is damaged, compressed or not a TFRecord"
                )
            size = int.from_bytes(length, "little")
            if size > end - offset - _FRAME_BYTES:
                raise ValueError(
                    f"{file}: the record at byte {offset} has {size} bytes, "
                    f"but the file ends at {end}"
                )
            data = opened.read(size)
            checksum = opened.read(4)
            yield _Record(offset, data, _masked(google_crc32c.value(data)) == checksum)
            offset += size + _FRAME_BYTES


def _read_features(data: bytes) -> _Features:
    """The first value of each feature in an Example that can be an image or a label.

    Raises:
        ValueError: The data are not an Example.
    """
    first_values: _Features = {}
    for features in _fields(data, (0, len(data)), 1):
        for entry in _fields(data, features, 1):
            key = b"".join(data[start:end] for start, end in _fields(data, entry, 1))
            if key not in _IMAGE_KEYS + _LABEL_KEYS:
                continue
            for feature in _fields(data, entry, 2):
                for kind in (_BYTES, _INTEGERS):
                    value = _first_value(data, feature, kind)
                    if value is not None:
                        first_values[key, kind] = value
    return first_values


def _first_value(data: bytes, feature: _Span, kind: int) -> _Span | None:
    """The first value of a kind in a feature that is not empty."""
    for values in _fields(data, feature, kind):
        for start, end in _fields(data, values, 1):
            if start < end:
                return start, end
    return None


def _fields(data: bytes, message: _Span, number: int) -> Iterator[_Span]:
    """The contents of the fields with a number in a message.

    Raises:
        ValueError: It is not a protobuf message.
    """
    at, end = message
    while at < end:
        tag, at = _read_varint(data, at, end)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, stop = _read_varint(data, at, end)
        elif wire_type == _LENGTH_DELIMITED:
            size, at = _read_varint(data, at, end)
            stop = at + size
        else:
            # Groups, which are obsolete, count as too long.
            stop = at + _FIXED_SIZES.get(wire_type, end)
        if stop > end:
            raise ValueError(_NOT_AN_EXAMPLE)
        if tag >> 3 == number:
            yield at, stop
        at = stop


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for i in range(at, min(at + 10, end)):
        value |= (data[i] & 127) << 7 * (i - at)
        if data[i] < 128:
            return value, i + 1
    raise ValueError(_NOT_AN_EXAMPLE)


def _read_label(data: bytes, features: _Features) -> Label:
    for key in _LABEL_KEYS:
        if (key, _INTEGERS) in features:
            value, _ = _read_varint(data, *features[key, _INTEGERS])
            is_negative = value >> 63
            return value - (is_negative << 64)
        if (key, _BYTES) in features:
            start, end = features[key, _BYTES]
            return os.fsdecode(data[start:end].strip()) or None
    return None
