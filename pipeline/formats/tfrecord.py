"""TFRecord: records of `tf.train.Example`, with the keys that image data sets in this format share.

Both layers are small enough to be written and read by hand: a record is a length and its data, each with a checksum;
an Example is a protobuf, Example{1: Features{1: entry{1: key, 2: Feature{1: bytes | 2: floats | 3: int64s}}, ...}}.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
from numpy.typing import NDArray

from ..stores import Progress
from .format import EncodedSample
from .index import Found, Scan, naturally
from .record_store import RecordStore, open_files

SUFFIX, SHARDED = ".tfrecord", True
_IMAGES = (
    b"image/encoded",
    b"image",
    b"image_raw",
    b"jpg",
)  # where an image is found, the first that there is
_LABELS = (b"image/class/label", b"label")
_NAME = re.compile(r"[^.].*(\.tfrecords?|-\d{5}-of-\d{5})")
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*)")
_BYTES, _INTEGERS = 1, 3  # the kinds of features that matter here


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

    # The image comes last, so that all else of the Example stands before it.
    image_size = len(sample.image)
    features = b"".join(entries) + _entry(b"image/encoded", _BYTES, b"", image_size)
    example = _field(1, features, image_size)

    length = (len(example) + image_size).to_bytes(8, "little")
    before = length + _masked(google_crc32c.value(length)) + example
    checksum = google_crc32c.extend(google_crc32c.value(example), sample.image)
    return before, _masked(checksum)


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    pass


def _entry(key: bytes, kind: int, value: bytes, missing: int = 0) -> bytes:
    """An entry of the table of features, of one value, whose last `missing` bytes follow elsewhere."""
    feature = _field(kind, _field(1, value, missing), missing)
    return _field(1, _field(1, key) + _field(2, feature, missing), missing)


def _field(number: int, content: bytes, missing: int = 0) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content) + missing) + content


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _varint(value // 128)


def _masked(crc: int) -> bytes:
    """A checksum as it is stored: turned, so that checksums of data that hold checksums stay sound."""
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def open(path: Path, progress: Progress) -> RecordStore:
    return open_files(path, files(path), scan, progress)


def files(path: Path) -> list[Path]:
    """ValueError where one of a set is missing: with `-00003-of-00010` belong nine others; or where there are two."""
    if not path.is_dir():
        return [path] if path.is_file() and _NAME.fullmatch(path.name) else []
    found = [
        path / name
        for name in os.listdir(path)
        if _NAME.fullmatch(name) and (path / name).is_file()
    ]
    sets: dict[tuple[str, str, str], set[int]] = {}
    for shard in filter(None, (_SHARD.fullmatch(file.name) for file in found)):
        sets.setdefault((shard["before"], shard["count"], shard["after"]), set()).add(
            int(shard["number"])
        )
    if len(sets) > 1:
        raise ValueError(
            f"{path} holds {' and '.join(sorted(before for before, *_ in sets))}: give each its own folder"
        )
    for (before, count, after), numbers in sets.items():
        missing = next((number for number in range(int(count)) if number not in numbers), None)
        if missing is not None:
            name = f"{before}-{missing:0{len(count)}}-of-{count}{after}"
            raise ValueError(
                f"{path} lacks {name}: restore it, or name single files to use them alone"
            )
    return sorted(found, key=naturally)


def scan(file: Path) -> Scan:
    """The sidecar is what DALI's tfrecord2idx writes."""
    found, lines, rejects = [], [], {}
    for at, data, reason in _records(file):
        name = f"record at byte {at}"
        lines.append(f"{at} {len(data) + 16}\n")
        try:
            if reason:
                raise ValueError(reason)
            values = _first_values(data)
            image = next((values[key, _BYTES] for key in _IMAGES if (key, _BYTES) in values), None)
            if image is None:
                raise ValueError(
                    f"it holds no image: none of {', '.join(key.decode() for key in _IMAGES)}"
                )
            found.append(Found(name, at + 12 + image[0], image[1] - image[0], _label(data, values)))
        except ValueError as error:
            rejects[name] = str(error)
    return Scan(found, "".join(lines), rejects)


def _records(file: Path) -> Iterator[tuple[int, bytes, str]]:
    """Where each record begins, its data, and what is wrong with those; ValueError where the next cannot be found."""
    at, end = 0, file.stat().st_size
    with file.open("rb") as records:
        while at < end:
            length, checksum = records.read(8), records.read(4)
            size = int.from_bytes(length, "little")
            if _masked(google_crc32c.value(length)) != checksum:
                raise ValueError(
                    f"{file}: no record begins at byte {at}: it is damaged, compressed or no TFRecord"
                )
            if size > end - at - 16:
                raise ValueError(
                    f"{file}: the record at byte {at} has {size} bytes, but the file ends at {end}"
                )
            data, checksum = records.read(size), records.read(4)
            yield (
                at,
                data,
                ""
                if _masked(google_crc32c.value(data)) == checksum
                else "damaged: its checksum is wrong",
            )
            at += size + 16


def _first_values(data: bytes) -> dict[tuple[bytes, int], tuple[int, int]]:
    """Where in an Example the first value of a key and kind begins and ends."""
    found: dict[tuple[bytes, int], tuple[int, int]] = {}
    for features in _fields(data, 0, len(data), 1):
        for entry in _fields(data, *features, 1):
            key = b"".join(data[start:end] for start, end in _fields(data, *entry, 1))
            for feature in _fields(data, *entry, 2) if key in _IMAGES + _LABELS else ():
                for kind in (_BYTES, _INTEGERS):
                    values = (
                        value
                        for values in _fields(data, *feature, kind)
                        for value in _fields(data, *values, 1)
                    )
                    if first := next((value for value in values if value[0] < value[1]), None):
                        found[key, kind] = first
    return found


def _fields(data: bytes, at: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Where the fields of that number begin and end in a message; ValueError where it is none."""
    while at < end:
        tag, at = _read_varint(data, at, end)
        if tag & 7 == 0:
            stop = _read_varint(data, at, end)[1]
        elif tag & 7 == 2:
            size, at = _read_varint(data, at, end)
            stop = at + size
        else:  # fixed sizes; groups, which are no longer used, end behind the end
            stop = at + {1: 8, 5: 4}.get(tag & 7, end)
        if stop > end:
            raise ValueError("it is no tf.train.Example")
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
    raise ValueError("it is no tf.train.Example")


def _label(data: bytes, values: dict[tuple[bytes, int], tuple[int, int]]) -> int | str | None:
    for key in _LABELS:
        if (key, _INTEGERS) in values:
            value, _ = _read_varint(data, *values[key, _INTEGERS])
            return value - (value >> 63 << 64)
        if (key, _BYTES) in values:
            return os.fsdecode(data[slice(*values[key, _BYTES])].strip()) or None
    return None
