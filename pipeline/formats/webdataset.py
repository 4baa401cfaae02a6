"""WebDataset: tar files with the parts of a sample, `<key>.jpg` and `<key>.cls`, side by side.

Nothing is ever unpacked: the name of a member is only shown, never used as a path.
"""

from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from ..stores import Progress
from .format import EncodedSample
from .record_store import RecordStore, natural_key, open_files
from .scanning import Label, Scan, ScannedImage
from .tar import BLOCK, Member, TarReader, escape_name, file_header, read_name

SUFFIX = ".tar"
SHARDED = True

# If a sample has several images, the first of these is the one.
_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
_COMPRESSED = (".tar.gz", ".tgz")


def begin(samples: int) -> bytes:
    return b""


def frame(offset: int, sample: EncodedSample) -> tuple[bytes, bytes]:
    size = len(sample.image)
    before = file_header(b"%08d.jpg" % sample.key, size)
    after = bytes(-size % BLOCK)
    if sample.label >= 0:
        digits = b"%d" % sample.label
        after += file_header(b"%08d.cls" % sample.key, len(digits)) + digits.ljust(BLOCK, b"\0")
    return before, after


def finish(file: BinaryIO, rows: NDArray[Any]) -> None:
    file.write(bytes(2 * BLOCK))


class TarStore(RecordStore):
    """Images in tar files."""

    def name(self, sample: int) -> str:
        """The file and the member's name, as far as its header holds it: a long name is cut."""
        row = self.index[[sample]][0]
        row["offset"] -= BLOCK
        row["bytes"] = BLOCK
        header = self._read(row)
        return f"{self.files[row['file']]}: {os.fsdecode(read_name(header))}"


def open(path: Path, progress: Progress) -> TarStore:
    store = open_files(path, files(path), scan, progress)
    return TarStore(
        path, store.files, store.index, store.classes, store.rejects, checksums=store.checksums
    )


def files(path: Path) -> list[Path]:
    """The tar files at `path`.

    Raises:
        ValueError: There are only compressed ones.
    """
    if path.is_dir():
        folder = path
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    else:
        folder = path.parent
        names = [path.name]
    if names and all(name.endswith(_COMPRESSED) for name in names):
        raise ValueError(
            f"{names[0]} is compressed, so nothing in it can be read at random: "
            "unpack it with gunzip"
        )
    tars = [folder / name for name in names if name.endswith(SUFFIX)]
    return sorted((file for file in tars if file.is_file()), key=natural_key)


def scan(file: Path) -> Scan:
    """List the images of a tar.

    The sidecar is what DALI's wds2idx writes, but also right for long names and for names with
    blanks, for which that of wds2idx is wrong.
    """
    images: list[ScannedImage] = []
    lines: list[str] = []
    with TarReader(file) as tar:
        for _, members in groupby(tar.members(), key=lambda member: member.key):
            sample = list(members)
            lines.append(" ".join(_sidecar_entry(member) for member in sample))
            parts = {member.extension.lower(): member for member in sample}
            extension = next((e for e in _IMAGE_EXTENSIONS if e in parts), None)
            if extension is not None:
                image = parts[extension]
                label = _read_label(tar, parts)
                images.append(ScannedImage(image.name, image.offset, image.size, label))
    rejects = {}
    if not images:
        rejects["its members"] = f"none ends in .{', .'.join(_IMAGE_EXTENSIONS)}"
    return Scan(images, "\n".join([f"v1.2 {len(lines)}", *lines, ""]), rejects)


def _sidecar_entry(member: Member) -> str:
    extension = escape_name(member.extension)
    return f"{extension} {member.offset} {member.size} {escape_name(member.name)}"


def _read_label(tar: TarReader, parts: dict[str, Member]) -> Label:
    """The number or name in `.cls`, else the "label" or "cls" in `.json`."""
    if "cls" in parts:
        text = tar.read_text(parts["cls"])
        if text.removeprefix(b"-").isdigit():
            return int(text[:20])
        return os.fsdecode(text) or None
    if "json" not in parts:
        return None
    try:
        description = json.loads(tar.read_text(parts["json"]))
        label = description.get("label", description.get("cls"))
    except (ValueError, AttributeError, RecursionError):  # it can hold anything
        return None
    return label if type(label) in (int, str) and label != "" else None
