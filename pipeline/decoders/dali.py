"""The decoder `dali`: NVIDIA DALI. On a GPU, nvJPEG decodes and the device crops and resizes.

DALI gets only images that it cannot fail on: ordinary JPEGs with whole headers, and pixels that
were decoded here of all others. A header that DALI refuses must not reach it: with batches of 32
or more it raises while its threads still work on the batch, and the process dies (DALI 2.4.0). A
damaged JPEG body is only an error: that batch is decoded here and run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..images import PPM, BadImage, decode, ppm_bytes
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import RandomResizedCrop, Recipe, WholeImage
from ..stores import Store
from .decoder import Boxes, Crops
from .jpeg_header import is_ordinary_jpeg

_BATCHES_AHEAD = 2  # in DALI; one more is being read
_INTERPOLATION = {
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
}
# One black pixel, in place of a bad image.
_PLACEHOLDER = np.frombuffer(PPM % (1, 1) + bytes(3), dtype=np.uint8)
_PLACEHOLDER_BOX = np.array((0, 0, 1, 1), dtype=np.float32)


@dataclass
class _Batch:
    samples: Samples  # [B]
    boxes: Boxes  # [V, B, 4]
    # As DALI gets them, None for a bad one: B of them, or one None for an empty batch, because DALI
    # has no empty batches.
    encoded: list[bytes | None]
    all_pixels: bool = False  # no image is left that DALI could refuse

    def good(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the samples are not bad, bool [B]."""
        encoded = self.encoded[: len(self.samples)]
        return np.array([data is not None for data in encoded], dtype=bool)


class DaliDecoder:
    """See `Decoder`. The crops are on `device`, and ready for use on its current stream.

    Args:
        store: The encoded images.
        recipe: Size, crop and interpolation of the views.
        threads: Threads that read, and DALI's own. The crops do not depend on their number.
        device: Where DALI works.
        hw_decoder_load: Fraction of the JPEGs for the GPU's hardware decoder, if it has one.
        reason: Why this decoder was chosen.
    """

    name = "dali"

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        threads: int,
        device: torch.device,
        hw_decoder_load: float,
        reason: str,
    ) -> None:
        self.store = store
        self.recipe = recipe
        self.threads = threads
        self.device = device
        self.hw_decoder_load = hw_decoder_load
        self.reason = reason

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        pool = single_threaded_workers(self.threads, "read")
        running = _RunningBatches(self, pool)
        try:
            for batch in self._read(plan, pool):
                running.add(batch)
                if len(running) > _BATCHES_AHEAD:
                    yield running.take_first()
            while len(running) > 0:
                yield running.take_first()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(
        self, plan: Iterable[tuple[Samples, Boxes]], pool: ThreadPoolExecutor
    ) -> Iterator[_Batch]:
        """The batches of the plan. Each is read while the one before it is in use."""
        reading: deque[tuple[Samples, Boxes, Iterator[list[bytes | None]]]] = deque()
        for samples, boxes in plan:
            parts = np.array_split(samples, 4 * self.threads)
            reading.append((samples, boxes, pool.map(self._read_encoded, parts)))
            if len(reading) > 1:
                yield _finish_reading(*reading.popleft())
        while reading:
            yield _finish_reading(*reading.popleft())

    def _read_encoded(self, samples: Samples) -> list[bytes | None]:
        """The images as DALI gets them; None for a bad one."""
        encoded: list[bytes | None] = []
        rows = self.store.index[samples]
        for data, row in zip(self.store.read_batch(samples), rows, strict=True):
            if is_ordinary_jpeg(data, int(row["height"]), int(row["width"])):
                encoded.append(data)
            else:
                encoded.append(_decode_to_ppm(data, row))
        return encoded

    def build_pipeline(self, batch_size: int) -> Pipeline:
        """DALI's pipeline: encoded images and boxes in, the crops of each view out."""
        gpu = self.device.type == "cuda"
        # A depth of 1 lets each batch run as soon as it is fed: `stream` decides how many do.
        pipeline = Pipeline(
            batch_size, self.threads, self.device.index if gpu else None, prefetch_queue_depth=1
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu")
            boxes = fn.external_source(name="boxes", device="cpu")
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
                hw_decoder_load=self.hw_decoder_load,
            )
            views = range(len(self.recipe.views))
            pipeline.set_outputs(*(self._crop(images, boxes[view]) for view in views))
        return pipeline

    def _crop(self, images: Any, box: Any) -> Any:
        """The three crops of `images.py` as DALI operations. A box is top, left, bottom, right."""
        crop = self.recipe.crop
        size = (self.recipe.size, self.recipe.size)
        interpolation = _INTERPOLATION[crop.interpolation]
        start = box[:2]
        end = box[2:]
        if isinstance(crop, RandomResizedCrop):
            inside = fn.slice(images, start=start, end=end, axes=(0, 1))
            return fn.resize(inside, size=size, interp_type=interpolation)
        if isinstance(crop, WholeImage):
            resized = fn.resize(images, size=end, interp_type=interpolation)
            return fn.resize(resized, size=size, interp_type=interpolation)
        return fn.resize(images, size=size, interp_type=interpolation, roi_start=start, roi_end=end)

    def feed(self, pipeline: Pipeline, batch: _Batch) -> None:
        """Start a batch."""
        images = [
            _PLACEHOLDER if data is None else np.frombuffer(data, np.uint8)
            for data in batch.encoded
        ]
        boxes = np.tile(_PLACEHOLDER_BOX, (len(batch.encoded), len(batch.boxes), 1))  # [B, V, 4]
        good = np.flatnonzero([data is not None for data in batch.encoded])
        top_left_bottom_right = batch.boxes[:, good][:, :, [1, 0, 3, 2]]  # [V, n, 4]
        boxes[good] = top_left_bottom_right.swapaxes(0, 1)
        if isinstance(self.recipe.crop, RandomResizedCrop):
            boxes = boxes.astype(np.int32)
        pipeline.feed_input("encoded", images)
        pipeline.feed_input("boxes", boxes)
        pipeline.schedule_run()

    def outputs(self, pipeline: Pipeline) -> list[Tensor]:
        """The crops of each view [B, S, S, 3] of the batch that was fed first, in DALI's memory.

        The device's current stream waits for them. RuntimeError if DALI refuses an image.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return [from_dlpack(view.as_tensor()) for view in pipeline.outputs(stream)]

    def decode_refused(self, batch: _Batch, pool: ThreadPoolExecutor) -> None:
        """Prepare a batch that DALI has refused to be run again.

        Images that the strict decoder refuses as well are bad. If there are none, DALI gets the
        pixels of all images.
        """
        rows = self.store.index[batch.samples]
        pixels = list(pool.map(_decode_again, batch.encoded, rows))
        decodable = [
            None if decoded is None else data
            for data, decoded in zip(batch.encoded, pixels, strict=True)
        ]
        if decodable == batch.encoded:  # all that DALI was given, so none explains its error
            batch.encoded = pixels
            batch.all_pixels = True
        else:
            batch.encoded = decodable


class _RunningBatches:
    """The batches that are in DALI, in order, and the pipeline that they run in."""

    def __init__(self, decoder: DaliDecoder, pool: ThreadPoolExecutor) -> None:
        self._decoder = decoder
        self._pool = pool
        self._batches: deque[_Batch] = deque()
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: _Batch) -> None:
        """Start a batch."""
        self._batches.append(batch)
        if self._pipeline is None or len(batch.encoded) > self._pipeline.max_batch_size:
            self._restart()
        else:
            self._decoder.feed(self._pipeline, batch)

    def take_first(self) -> Crops:
        """Wait for the batch that was started first."""
        batch = self._batches[0]
        views = self._wait_for(batch)
        self._batches.popleft()
        # Stacked: [V, B, S, S, 3], copied out of DALI's memory.
        return torch.stack(views)[:, : len(batch.samples)], batch.good()

    def _wait_for(self, batch: _Batch) -> list[Tensor]:
        while True:
            try:
                return self._decoder.outputs(self._pipeline)
            except RuntimeError:
                if batch.all_pixels:
                    raise
            # DALI declares a pipeline invalid that has raised. Its memory is needed for the next.
            self._pipeline = None
            self._decoder.decode_refused(batch, self._pool)
            self._restart()

    def _restart(self) -> None:
        """Start all batches in a new pipeline."""
        largest = max(len(batch.encoded) for batch in self._batches)
        self._pipeline = self._decoder.build_pipeline(largest)
        for batch in self._batches:
            self._decoder.feed(self._pipeline, batch)


def _finish_reading(samples: Samples, boxes: Boxes, parts: Iterator[list[bytes | None]]) -> _Batch:
    encoded = [data for part in parts for data in part]
    if not encoded:
        return _Batch(samples, boxes, encoded=[None], all_pixels=True)
    return _Batch(samples, boxes, encoded)


def _decode_to_ppm(data: bytes, row: Any) -> bytes | None:
    """An encoded image as a PPM of its pixels, which DALI takes as they are; None if it is bad."""
    try:
        pixels = decode(data, int(row["height"]), int(row["width"]))  # [3, H, W]
    except BadImage:
        return None
    return ppm_bytes(pixels.permute(1, 2, 0).numpy())


def _decode_again(data: bytes | None, row: Any) -> bytes | None:
    """As `_decode_to_ppm`, for an image that may be known to be bad, or be a PPM already."""
    if data is None or data.startswith(b"P6"):
        return data
    return _decode_to_ppm(data, row)
