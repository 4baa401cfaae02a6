"""Writes one shard: prepared images are appended in order, and entered in a journal.

Every byte of a shard follows from the plan, so that one that was not finished can be continued at
the point where its journal ends.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..formats import FORMATS, EncodedSample
from ..formats.index import sidecar_path
from .journal import (
    REJECTED,
    ConversionProgress,
    JournalRow,
    count_rejects,
    index_rows,
    journal_array,
    parse_journal,
    progress_of,
    read_journal,
)
from .jpeg_encoding import StandardJpeg
from .plan import Plan
from .prepare import PreparedImage, prepare_chunks
from .source_types import Source
from .work_folder import WorkFolder


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    plan: Plan
    shard: int  # its number
    name: str  # of its file
    folder: WorkFolder
    strict: bool  # whether a bad image raises ValueError


def write_shard(
    task: ShardTask,
    source: Source,
    pool: Executor,
    chunks_ahead: int,
    on_progress: Callable[[ConversionProgress], None],
) -> None:
    """Write a shard, or what is missing of it.

    Args:
        task: The shard.
        source: The images.
        pool: Its threads prepare the images.
        chunks_ahead: How many chunks of images the pool works on at a time.
        on_progress: Called with what is done since the last call; first with what an earlier
            conversion has done.

    Raises:
        ValueError: An image is bad, if `task.strict`; or another process writes this shard.
    """
    files = task.folder.shard_files(task.name)
    if files.finished.exists():
        on_progress(progress_of(read_journal(files.journal)))
        return
    with _open_shard(task, source) as shard:
        on_progress(progress_of(shard.journal))
        missing = shard.numbers[len(shard.journal) :]
        for chunk in prepare_chunks(task.plan, source, missing, pool, chunks_ahead):
            on_progress(progress_of(shard.append(chunk)))
        shard.finish()


@contextmanager
def _open_shard(task: ShardTask, source: Source) -> Iterator[_UnfinishedShard]:
    """Open the files of a shard, and cut off what its journal does not cover.

    Raises:
        ValueError: Another process writes this shard.
    """
    paths = task.folder.shard_files(task.name)
    with (
        _open_unbuffered(paths.unfinished) as file,
        _open_unbuffered(paths.journal) as journal,
        _open_unbuffered(paths.rejects) as rejects,
    ):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a worker of a cluster outlives the command that it works for
            raise ValueError(
                f"{task.name} is still being written for an earlier command: wait for it"
            ) from None
        yield _UnfinishedShard(task, source, file, journal, rejects)


class _UnfinishedShard:
    """The open files of a shard: its records, its journal, and the reasons of its rejects.

    Attributes:
        numbers: The numbers in the source of its images.
        journal: The rows that were there when it was opened.
    """

    def __init__(
        self, task: ShardTask, source: Source, file: FileIO, journal: FileIO, rejects: FileIO
    ) -> None:
        self._task = task
        self._source = source
        self._format = FORMATS[task.plan.format]
        self._file = file
        self._journal_file = journal
        self._rejects_file = rejects

        self._first_position, self.numbers = task.plan.shard_images(task.shard)
        header = self._format.begin(len(self.numbers))
        self.journal = self._recover(len(header))
        self._journal_parts = [self.journal]
        self._position = len(self.journal)  # in this shard
        if self._position:
            self._end = int(self.journal["end"][-1])  # of the last record in the file
        else:
            _append(file, [header])
            self._end = len(header)

    def append(self, chunk: list[PreparedImage]) -> NDArray[Any]:
        """Write a chunk of images; return its rows of the journal."""
        rows: list[JournalRow] = []
        records: list[bytes] = []
        reasons: list[bytes] = []
        for image in chunk:
            if image.jpeg is None:
                reasons.append(self._reject(image))
                rows.append(self._reject_row(image))
                continue
            position = self._position + len(rows)
            before, after = self._frame(
                self._end, position, image.number, image.jpeg, image.checksum
            )
            records += (before, image.jpeg.data, after)
            offset = self._end + len(before)
            self._end = offset + len(image.jpeg.data) + len(after)
            rows.append(self._row(image, image.jpeg, offset))

        journal = journal_array(rows)
        self._journal_parts.append(journal)
        self._position += len(rows)
        _append(self._file, records)
        _append(self._rejects_file, reasons)
        _append(self._journal_file, [journal.tobytes()])  # last: all that it covers is there
        return journal

    def finish(self) -> None:
        """Complete the file, and give it its final name."""
        paths = self._task.folder.shard_files(self._task.name)
        # The final name says that these two are complete, so they have to be on the disk first.
        os.fsync(self._journal_file.fileno())
        os.fsync(self._rejects_file.fileno())
        rows = index_rows(np.concatenate(self._journal_parts))
        with open(paths.unfinished, "r+b") as file:
            file.seek(0, os.SEEK_END)
            self._format.finish(file, rows)
            file.flush()
            os.fsync(file.fileno())
        if len(rows):
            sidecar = self._format.scan(paths.unfinished).sidecar  # also reads what was written
            if sidecar:
                sidecar_path(paths.finished).write_text(sidecar)
        os.replace(paths.unfinished, paths.finished)

    def _row(self, image: PreparedImage, jpeg: StandardJpeg, offset: int) -> JournalRow:
        return JournalRow(
            label=int(self._source.labels[image.number]),
            height=jpeg.height,
            width=jpeg.width,
            file=self._task.shard,
            offset=offset,
            size=len(jpeg.data),
            checksum=image.checksum,
            end=self._end,
            source=image.number,
            treatment=jpeg.treatment.encode(),
        )

    def _reject_row(self, image: PreparedImage) -> JournalRow:
        return JournalRow(
            label=-1,
            height=0,
            width=0,
            file=self._task.shard,
            offset=0,
            size=0,
            checksum=0,
            end=self._end,
            source=image.number,
            treatment=REJECTED,
        )

    def _reject(self, image: PreparedImage) -> bytes:
        """The line about an image that is left out; ValueError if none may be."""
        name = self._source.name(image.number)
        if self._task.strict:
            raise ValueError(f"{name}: {image.reason}")
        return reject_line(image.number, name, image.reason)

    def _frame(
        self, offset: int, position: int, number: int, jpeg: StandardJpeg, checksum: int
    ) -> tuple[bytes, bytes]:
        """The bytes before and after an image in the file."""
        sample = EncodedSample(
            key=self._first_position + position,
            name=self._source.name(number),
            label=int(self._source.labels[number]),
            height=jpeg.height,
            width=jpeg.width,
            image=jpeg.data,
            checksum=checksum,
        )
        return self._format.frame(offset, sample)

    def _recover(self, header_bytes: int) -> NDArray[Any]:
        """The rows of the journal whose records are intact; all files are cut off after these.

        After a power failure, the journal may cover records that never reached the disk.
        """
        rows = parse_journal(self._journal_file.read())
        reject_lines = self._rejects_file.read().splitlines(keepends=True)
        intact = 0
        rejected = 0
        record_start = header_bytes
        for row in rows:
            if row["treatment"] == REJECTED:
                if rejected == len(reject_lines):
                    break
                rejected += 1
            else:
                if not self._is_intact(row, intact, record_start):
                    break
                record_start = int(row["end"])
            intact += 1
        rows = rows[:intact]

        _cut_off(self._file, int(rows["end"][-1]) if intact else 0)
        _cut_off(self._journal_file, rows.nbytes)
        kept_lines = reject_lines[: count_rejects(rows)]
        _cut_off(self._rejects_file, sum(len(line) for line in kept_lines))
        return rows

    def _is_intact(self, row: Any, position: int, start: int) -> bool:
        """Whether the file holds the record of a journal row, from byte `start` on."""
        self._file.seek(start)
        record = self._file.read(max(0, int(row["end"]) - start))
        image_start = int(row["offset"]) - start
        image = record[image_start : image_start + int(row["bytes"])]
        checksum = int(row["checksum"])
        if not row["treatment"] or google_crc32c.value(image) != checksum:
            return False
        jpeg = StandardJpeg(image, int(row["height"]), int(row["width"]))
        before, after = self._frame(start, position, int(row["source"]), jpeg, checksum)
        return record == before + image + after


def reject_line(number: int | None, name: str, reason: str) -> bytes:
    """A line of `<target>.rejects.jsonl`: number and name in the source, and why it is left out."""
    return json.dumps({"source": number, "name": name, "reason": reason}).encode() + b"\n"


def _append(file: FileIO, parts: list[bytes]) -> None:
    """Write all of the parts, in one call of the system if it takes them all."""
    if not parts:
        return
    size = sum(len(part) for part in parts)
    written = os.writev(file.fileno(), parts)
    if written < size:  # a signal, or a disk that is almost full
        rest = memoryview(b"".join(parts))
        while written < size:
            written += os.write(file.fileno(), rest[written:])


def _cut_off(file: FileIO, size: int) -> None:
    """Truncate a file, and continue writing there."""
    file.truncate(size)
    file.seek(size)


def _open_unbuffered(path: Path) -> FileIO:
    """Open a file for reading and writing, without a buffer; create it if it does not exist."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
