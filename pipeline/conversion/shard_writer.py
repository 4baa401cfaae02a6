"""One file of a conversion: images made ready in threads, appended in order, and told of in a journal.

The journal says where a file that was not finished can be continued: every byte of it follows from the `Plan`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..formats import FORMATS
from ..formats.index import ROW, sidecar_path
from ..images import BadImage
from ..order import Samples
from ..stores import shuffled
from .jpeg_encoding import Jpeg, as_jpeg
from .sources import Source

_JOURNAL = np.dtype(
    [*ROW.descr, ("end", "<i8"), ("source", "<i8"), ("done", "S32")]
)  # `end` of the record in the file
Framed = tuple[bytes, bytes]  # what stands before and after an image
REJECTED = b"rejected"  # what was done to an image that is not there
_TOGETHER = (
    1 << 20
)  # bytes of images that a thread takes at a time: each hand-over costs as much as a small image


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of a conversion."""

    source: str
    identity: str  # see `Source`
    images: int
    format: str
    shards: int
    seed: int
    max_side: int | None
    short_side: int | None
    quality: int | None
    validate: bool

    def files(self, target: Path) -> list[str]:
        """The names of the files of the result."""
        if not FORMATS[self.format].SHARDED:
            return [target.name]
        of = f"-of-{self.shards:05d}" if self.format == "tfrecord" else ""
        return [
            f"shard-{shard:05d}{of}{FORMATS[self.format].SUFFIX}" for shard in range(self.shards)
        ]

    def positions(self, shard: int) -> tuple[int, Samples]:
        """The first position of a shard in the data set, and the numbers in the source of what lies there."""
        first, last = (self.images * edge // self.shards for edge in (shard, shard + 1))
        return first, self.order()[first:last]

    def order(self) -> Samples:
        """Which image of the source lies where, were none of them bad."""
        return _order(self.images, self.seed)


class ConversionProgress(NamedTuple):
    """How far a conversion is."""

    images: int = 0  # done, rejects among them
    rejects: int = 0
    bytes: int = 0


def prepare(source: Source, number: int, plan: Plan) -> Jpeg | str:
    """An image as it is to be written, or why it is left out: a pure function of its arguments.

    OSError where it is not the image that is out of reach, but the source.
    """
    try:
        return as_jpeg(
            source.read(number), plan.max_side, plan.short_side, plan.quality, plan.validate
        )
    except BadImage as error:
        return str(error)


def write_file(
    plan: Plan,
    source: Source,
    shard: int,
    final: Path,
    strict: bool,
    pool: Executor,
    ahead: int,
    wrote: Callable[[ConversionProgress], None],
) -> None:
    """Writes one file of the result, from where its journal ends."""
    format, (first, numbers) = FORMATS[plan.format], plan.positions(shard)
    growing, journal_path, rejects_path = work_files(final)
    if final.exists():
        return wrote(_count(read_journal(journal_path)))

    def frame(
        at: int, position: int, number: int, height: int, width: int, image: bytes, checksum: int
    ) -> Framed:
        name, label = source.name(number), int(source.labels[number])
        return format.frame(at, first + position, name, label, height, width, image, checksum)

    with _grown(growing) as file, _grown(journal_path) as journal, _grown(rejects_path) as rejects:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a worker of a cluster outlives the command that it works for
            raise ValueError(
                f"{final.name} is being written, for a command that was ended: wait for it"
            ) from None
        done = _recover(file, journal, rejects, len(format.begin(len(numbers))), frame)
        parts, position, end = [done], len(done), int(done["end"][-1]) if len(done) else 0
        wrote(_count(done))
        if not position:
            end = _append(file, [format.begin(len(numbers))])
        for chunk in _prepared(plan, source, numbers[position:], pool, ahead):
            data: list[bytes] = []
            rows: list[tuple[Any, ...]] = []
            reasons: list[bytes] = []
            for number, image, checksum in chunk:
                if isinstance(image, str):
                    name = source.name(number)
                    if strict:
                        raise ValueError(f"{name}: {image}")
                    reasons.append(json_line({"source": number, "name": name, "reason": image}))
                    rows.append((-1, 0, 0, shard, 0, 0, 0, end, number, REJECTED))
                    continue
                size = image.height, image.width
                before, after = frame(
                    end, position + len(rows), number, *size, image.data, checksum
                )
                data += (before, image.data, after)
                at, end = end + len(before), end + len(before) + len(image.data) + len(after)
                label = int(source.labels[number])
                rows.append(
                    (
                        label,
                        *size,
                        shard,
                        at,
                        len(image.data),
                        checksum,
                        end,
                        number,
                        image.done.encode(),
                    )
                )
            parts.append(np.array(rows, dtype=_JOURNAL))
            position += len(rows)
            _append(file, data)
            _append(rejects, reasons)
            _append(journal, [parts[-1].tobytes()])  # last: what it tells of is there
            wrote(_count(parts[-1]))
        for told in (journal, rejects):
            os.fsync(told.fileno())  # before the file has its name, which says that they are whole
        index = index_rows(np.concatenate(parts))
        with open(growing, "r+b") as whole:
            whole.seek(0, os.SEEK_END)
            format.finish(whole, index)
            whole.flush()
            os.fsync(whole.fileno())
        sidecar = format.scan(growing).sidecar if len(index) else ""  # reads what was written, too
        if sidecar:
            sidecar_path(final).write_text(sidecar)
        os.replace(growing, final)


def _prepared(
    plan: Plan, source: Source, numbers: Samples, pool: Executor, ahead: int
) -> Iterator[list[tuple[int, Jpeg | str, int]]]:
    """Chunks of (number in the source, image, its checksum), in order; `ahead` of them at a time in the pool."""

    def some(numbers: Samples) -> list[tuple[int, Jpeg | str, int]]:
        images = [(int(number), prepare(source, int(number), plan)) for number in numbers]
        return [
            (n, image, 0 if isinstance(image, str) else google_crc32c.value(image.data))
            for n, image in images
        ]

    waiting: deque[Future[list[tuple[int, Jpeg | str, int]]]] = deque()
    at, mean = 0, float(_TOGETHER)  # one by one until their size is known: they may be of 20 MB
    while at < len(numbers) or waiting:
        while at < len(numbers) and len(waiting) < ahead:
            together = int(np.clip(_TOGETHER / mean, 1, 64))
            waiting.append(pool.submit(some, numbers[at : at + together]))
            at += together
        chunk = waiting.popleft().result()
        mean = (
            mean
            + sum(len(image.data) for _, image, _ in chunk if not isinstance(image, str))
            / len(chunk)
        ) / 2
        yield chunk


def _recover(
    file: FileIO, journal: FileIO, rejects: FileIO, begins: int, frame: Callable[..., Framed]
) -> NDArray[Any]:
    """The journal as far as the others have what it tells of; all three are cut off there, and stand at their ends.

    begins: where the first record does; frame: makes what stands around an image, of which it has to be the same.
    """
    told, lines = journal.read(), rejects.read().splitlines(keepends=True)
    rows = np.frombuffer(told[: len(told) // _JOURNAL.itemsize * _JOURNAL.itemsize], dtype=_JOURNAL)
    kept, rejected, at = 0, 0, begins
    for row in rows:
        if row["done"] == REJECTED:
            rejected += 1
            if rejected > len(lines):
                break
        else:
            file.seek(at)
            record, start = file.read(max(0, int(row["end"]) - at)), int(row["offset"]) - at
            image, checksum = record[start : start + int(row["bytes"])], int(row["checksum"])
            if not row["done"] or google_crc32c.value(image) != checksum:
                break
            before, after = frame(
                at, kept, *(int(row[n]) for n in ("source", "height", "width")), image, checksum
            )
            if record != before + image + after:
                break
            at = int(row["end"])
        kept += 1
    rows = rows[:kept]
    for cut, to in (
        (file, int(rows["end"][-1]) if kept else 0),
        (journal, kept * _JOURNAL.itemsize),
        (rejects, sum(map(len, lines[: int((rows["done"] == REJECTED).sum())]))),
    ):
        cut.truncate(to)
        cut.seek(to)
    return rows


def _append(file: FileIO, parts: list[bytes]) -> int:
    """Writes all of the parts at once; how many bytes that was."""
    size = sum(map(len, parts))
    written = os.writev(file.fileno(), parts) if parts else 0
    if written < size:  # a signal, or a disk that is almost full
        rest = memoryview(b"".join(parts))
        while written < size:
            written += os.write(file.fileno(), rest[written:])
    return size


def work_files(final: Path) -> tuple[Path, Path, Path]:
    """What a file is until it is finished, its journal, and the reasons of its rejects."""
    work = final.parent.parent / "journal"
    return (
        work / f"{final.name}.growing",
        work / f"{final.name}.rows",
        work / f"{final.name}.rejects.jsonl",
    )


def _grown(path: Path) -> FileIO:
    """A file opened for reading and writing without a buffer, made where there is none."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")


def read_journal(path: Path) -> NDArray[Any]:
    return np.fromfile(path, dtype=_JOURNAL)


def index_rows(journal: NDArray[Any]) -> NDArray[Any]:
    """What an index says of it."""
    good = journal[journal["done"] != REJECTED]
    rows = np.zeros(len(good), dtype=ROW)
    for name in ROW.names or ():
        rows[name] = good[name]
    return rows


def _count(journal: NDArray[Any]) -> ConversionProgress:
    return ConversionProgress(
        len(journal), int((journal["done"] == REJECTED).sum()), int(journal["bytes"].sum())
    )


def json_line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


@lru_cache(1)
def _order(images: int, seed: int) -> Samples:
    return shuffled(images, seed)
