"""Prepares images for writing: reads them and makes them standard JPEGs, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

import google_crc32c
import numpy as np

from ..images import BadImage
from ..order import Samples
from .jpeg_encoding import StandardJpeg, to_standard_jpeg
from .plan import Plan
from .source_types import Source

# A thread prepares a chunk at a time, since handing it over costs as much as a small image.
_CHUNK_BYTES = 1 << 20
_LARGEST_CHUNK = 64  # images


class PreparedImage(NamedTuple):
    """An image as it is written, or why it is left out."""

    number: int  # in the source
    jpeg: StandardJpeg | None
    checksum: int = 0  # CRC-32C of the JPEG
    reason: str = ""  # why it is left out


def prepare_image(source: Source, number: int, plan: Plan) -> PreparedImage:
    """An image as it is written: a pure function of its arguments.

    Raises:
        OSError: The source as a whole is out of reach.
    """
    try:
        jpeg = to_standard_jpeg(
            source.read(number), plan.max_side, plan.short_side, plan.quality, plan.validate
        )
    except BadImage as error:
        return PreparedImage(number, None, reason=str(error))
    return PreparedImage(number, jpeg, google_crc32c.value(jpeg.data))


def prepare_chunks(
    plan: Plan, source: Source, numbers: Samples, pool: Executor, chunks_ahead: int
) -> Iterator[list[PreparedImage]]:
    """The images with these numbers in the source, in order, in chunks that the pool prepares.

    The first chunks are of one image each: until their size is known, they may be of 20 MB.
    """

    def prepare(numbers: Samples) -> list[PreparedImage]:
        return [prepare_image(source, int(number), plan) for number in numbers]

    waiting: deque[Future[list[PreparedImage]]] = deque()
    submitted = 0
    mean_bytes = float(_CHUNK_BYTES)  # of an image: a moving average
    while submitted < len(numbers) or waiting:
        while submitted < len(numbers) and len(waiting) < chunks_ahead:
            images = int(np.clip(_CHUNK_BYTES / mean_bytes, 1, _LARGEST_CHUNK))
            waiting.append(pool.submit(prepare, numbers[submitted : submitted + images]))
            submitted += images
        chunk = waiting.popleft().result()
        chunk_bytes = sum(len(image.jpeg.data) for image in chunk if image.jpeg is not None)
        mean_bytes = (mean_bytes + chunk_bytes / len(chunk)) / 2
        yield chunk
