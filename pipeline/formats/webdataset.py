"""WebDataset: tar files in which the parts of a sample, `<key>.jpg` and `<key>.cls`, lie side by side.

Nothing is ever unpacked: a member's name is something to show, never a path.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from ..stores import Progress
from .format import EncodedSample
from .index import Found, Scan, naturally
from .record_store import RecordStore, open_files

SUFFIX, SHARDED = ".tar", True
_IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "ppm",
)  # the first of them is the image where a sample has several
_BLOCK = 512
_TEXT_BYTES = 1 << 20  # at most, of a label or a long name: a damaged length would fill the memory
_PAX_RECORD = re.compile(rb"\d{1,9} ([^=\n]{1,99})=([^\n]*)\n")
_UNLISTED = re.compile(r"[\0- \\\x7f\ud800-\udfff]")
_Read = Callable[[int, int], bytes]  # offset, size


def begin(samples: int) -> bytes:
    return b""


def frame(offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
    size = len(sample.image)
    before = _header(b"%08d.jpg" % sample.key, size)
    after = bytes(-size % _BLOCK)
    if sample.label >= 0:
        digits = b"%d" % sample.label
        after += _header(b"%08d.cls" % sample.key, len(digits)) + digits.ljust(_BLOCK, b"\0")
    return before, after


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    file.write(bytes(2 * _BLOCK))


def _header(name: bytes, size: int) -> bytes:
    """That of a file of nobody's, from 1970: the same images make the same tar. Five times as fast as `tarfile`."""
    start = (
        name.ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"0" * 11
        + b"\0"
    )
    end = b"0" + bytes(100) + b"ustar\00000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
    return start + b"%06o\0 " % (sum(start) + sum(b" " * 8) + sum(end)) + end


class TarStore(RecordStore):
    """Images in tar files."""

    def name(self, sample: int) -> str:
        """The file, and the member's name as far as it stands in its header: a long one is cut."""
        row = self.index[[sample]][0]
        row["offset"], row["bytes"] = row["offset"] - _BLOCK, _BLOCK
        return f"{self.files[row['file']]}: {os.fsdecode(_name(self._read(row)))}"


def open(path: Path, progress: Progress) -> TarStore:
    found = open_files(path, files(path), scan, progress)
    return TarStore(
        path, found.files, found.index, found.classes, found.rejects, checksums=found.checksums
    )


def files(path: Path) -> list[Path]:
    names = (
        [name for name in os.listdir(path) if not name.startswith(".")]
        if path.is_dir()
        else [path.name]
    )
    if names and all(name.endswith((".tar.gz", ".tgz")) for name in names):
        raise ValueError(
            f"{names[0]} is compressed, so nothing in it can be read at random: unpack it with gunzip"
        )
    folder = path if path.is_dir() else path.parent
    return sorted(
        (folder / n for n in names if n.endswith(SUFFIX) and (folder / n).is_file()), key=naturally
    )


def scan(file: Path) -> Scan:
    """The sidecar is what DALI's wds2idx writes, but right where that is wrong: long names, and names with blanks."""
    found, lines = [], []
    with file.open(
        "rb", buffering=8192
    ) as tar:  # a label and the header behind it come with one read

        def read(offset: int, size: int) -> bytes:
            tar.seek(offset)
            return tar.read(min(size, _TEXT_BYTES))

        for _, group in groupby(_members(file, read), itemgetter(0)):
            members = list(group)
            lines.append(
                " ".join(
                    f"{_listed(ext)} {m.offset} {m.bytes} {_listed(m.name)}"
                    for _, ext, m in members
                )
            )
            parts = {extension.lower(): member for _, extension, member in members}
            if image := next(
                (parts[extension] for extension in _IMAGES if extension in parts), None
            ):
                found.append(image._replace(label=_label(read, parts)))
    rejects = {} if found else {"its members": f"none ends in .{', .'.join(_IMAGES)}"}
    return Scan(found, "\n".join([f"v1.2 {len(lines)}", *lines, ""]), rejects)


def _listed(name: str) -> str:
    """With octals as tar lists it; blanks too, which would end a name for DALI."""
    return _UNLISTED.sub(lambda odd: "".join(f"\\{byte:03o}" for byte in os.fsencode(odd[0])), name)


def _label(read: _Read, parts: dict[str, Found]) -> int | str | None:
    """The number or name in `.cls`, or what `.json` calls "label" or "cls"."""
    part = parts.get("cls") or parts.get("json")
    text = read(part.offset, part.bytes).strip() if part else b"{}"
    if "cls" in parts:
        return int(text[:20]) if text.removeprefix(b"-").isdigit() else os.fsdecode(text) or None
    try:
        said = json.loads(text)
        label = said.get("label", said.get("cls"))
    except (ValueError, AttributeError, RecursionError):  # whatever else people keep in there
        return None
    return label if type(label) in (int, str) and label != "" else None


def _members(file: Path, read: _Read) -> Iterator[tuple[str, str, Found]]:
    """What belongs to samples, with its key and extension, by the headers alone: ustar, GNU's and pax.

    ValueError where a header is damaged, or a member or the mark of the end is missing.
    """
    at, end, long_name, pax = 0, file.stat().st_size, b"", dict[bytes, bytes]()
    while (header := read(at, _BLOCK)).strip(b"\0"):
        # The lower half of Adler-32 is the sum of the bytes plus one, modulo 65521: 13 times as fast as `sum`.
        total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
        if total != (_number(header[148:156]) + 1) % 65521:
            raise ValueError(
                f"{file}: no header of a tar at byte {at}: it is damaged or no tar, get it again"
            )
        kind, offset, size = header[156:157], at + _BLOCK, _number(header[124:136])
        if kind in b"123456":  # links, devices and folders hold no data, whatever they say
            size = 0
        elif kind not in b"xgLK" and b"size" in pax:
            size = _number(pax[b"size"], 10)
        more = kind == b"S" and header[482]
        while more:  # a sparse file has more of its map behind its header
            more, offset = read(offset, _BLOCK).ljust(_BLOCK, b"\0")[504], offset + _BLOCK
        if not 0 <= size <= end - offset:
            raise ValueError(
                f"{file}: the member at byte {at} has {size} bytes, but the file ends at {end}"
            )
        at = offset + size + -size % _BLOCK
        if kind == b"x":
            pax |= dict(_PAX_RECORD.findall(read(offset, size)))
        elif kind == b"L":
            long_name = _text(read(offset, size))
        else:
            name = os.fsdecode(_text(pax.get(b"path", long_name)) or _name(header))
            dot = name.find(
                ".", name.rfind("/") + 1
            )  # where there is none, the last letter: as wds2idx has it
            key, extension = name[:dot], name[dot + 1 :]
            is_file = kind in b"0\0" and name[-1:] != "/" and b"GNU.sparse" not in b" ".join(pax)
            if is_file and extension and key and key[-1] != "/":  # hidden files belong to no sample
                yield key, extension, Found(name, offset, size, None)
            long_name, pax = b"", {}
    if len(header) < _BLOCK:
        raise ValueError(
            f"{file} stops at byte {end} without the mark of a tar's end: it was cut off, get it again"
        )


def _number(field: bytes, base: int = 8) -> int:
    """A number as a tar has it: digits, or binary where the first bit is set; -1 for what is none."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    try:
        return int(_text(field) or b"0", base)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    folder = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return folder + b"/" * bool(folder) + _text(header[:100])


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
