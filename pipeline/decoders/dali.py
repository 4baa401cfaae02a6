"""The decoder for a GPU: NVIDIA DALI, where nvJPEG decodes and the device crops and resizes. The same code on the CPU.

DALI gets only what cannot surprise it: ordinary JPEGs with whole headers, and all else as pixels that are decoded here.
No header that it refuses may reach it: from batches of 32 on it then raises while its threads are still at work on the
batch, and the process dies (DALI 2.4.0). A damaged body is only an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..images import PPM, BadImage, as_ppm, decode
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import RandomResizedCrop, Recipe, WholeImage
from ..stores import Store
from .decoder import Boxes, Crops

_BATCHES_AHEAD = 2  # in DALI; one more is being read
_INTERPOLATION = {
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
}
_STAND_IN, _STAND_IN_BOX = (
    np.frombuffer(PPM % (1, 1) + bytes(3), dtype=np.uint8),
    (0, 0, 1, 1),
)  # for what is bad

# JPEG markers: frames that every decoder knows (Huffman-coded, sequential or progressive), and what may stand beside.
_FRAMES, _SCAN, _ADOBE = (0xC0, 0xC1, 0xC2), 0xDA, 0xEE
_OTHERS = (
    0xC4,
    0xDB,
    0xDD,
    *range(0xE0, 0xF0),
    0xFE,
)  # Huffman and quantisation tables, restarts, metadata
_END, _END_BYTES = (
    b"\xff\xd9",
    1024,
)  # the end marker, and how far before the end of the file: some writers pad


@dataclass
class _Batch:
    samples: Samples  # [B]
    boxes: Boxes  # [V, B, 4]
    encoded: list[
        bytes | None
    ]  # [B] as DALI gets them, None for a bad one; that too where B is 0, which DALI has not
    raw: bool = False  # whether all are pixels already: nothing is left that DALI could refuse


class DaliDecoder:
    """See `Decoder`. The crops lie on `device`, ready for its current stream, and do not depend on `threads`.

    `hw_decoder_load` is the fraction of the JPEGs that the GPU's decoding engine gets, where there is one.
    """

    name = "dali"

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        threads: int,
        device: torch.device,
        hw_decoder_load: float,
        why: str,
    ) -> None:
        self.store, self.recipe, self.threads, self.why = store, recipe, threads, why
        self.device, self.hw_decoder_load = device, hw_decoder_load
        self.reads_outside = not isinstance(recipe.crop, RandomResizedCrop)  # see `images.crop`
        self.resizes_first = isinstance(recipe.crop, WholeImage)

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        pool = single_threaded_workers(self.threads, "read")
        pipeline: Any = None
        running: deque[_Batch] = deque()
        try:
            batches = self._read(plan, pool)
            while (batch := next(batches, None)) or running:
                if batch is not None:
                    running.append(batch)
                    if pipeline is None or len(batch.encoded) > pipeline.max_batch_size:
                        pipeline = self._start(running)
                    else:
                        self._feed(pipeline, batch)
                    if len(running) <= _BATCHES_AHEAD:
                        continue
                while (views := self._outputs(pipeline, running[0])) is None:
                    pipeline = None  # DALI calls one that has raised invalid; its memory is needed for the next
                    self._mend(running[0], pool)
                    pipeline = self._start(running)
                done = running.popleft()
                crops = torch.stack(views)[
                    :, : len(done.samples)
                ]  # [V, B, S, S, 3], copied out of DALI's memory
                yield (
                    crops,
                    np.array(
                        [data is not None for data in done.encoded[: len(done.samples)]], dtype=bool
                    ),
                )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, running: Iterable[_Batch]) -> Pipeline:
        """A new pipeline that is at work on those batches."""
        gpu, size = self.device.type == "cuda", (self.recipe.size, self.recipe.size)
        kind = _INTERPOLATION[self.recipe.crop.interpolation]
        largest = max(len(batch.encoded) for batch in running)
        # A depth of 1 lets each batch run as soon as it is fed: how far ahead is decided in `stream`.
        pipeline = Pipeline(
            largest, self.threads, self.device.index if gpu else None, prefetch_queue_depth=1
        )
        with pipeline:
            encoded, boxes = (
                fn.external_source(name=name, device="cpu") for name in ("encoded", "boxes")
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
                hw_decoder_load=self.hw_decoder_load,
            )
            views = []
            for view in range(len(self.recipe.views)):
                start, end = boxes[view, :2], boxes[view, 2:]
                if self.resizes_first:
                    resized = fn.resize(images, size=end, interp_type=kind)
                    views.append(fn.resize(resized, size=size, interp_type=kind))
                elif self.reads_outside:
                    views.append(
                        fn.resize(images, size=size, interp_type=kind, roi_start=start, roi_end=end)
                    )
                else:
                    inside = fn.slice(images, start=start, end=end, axes=(0, 1))
                    views.append(fn.resize(inside, size=size, interp_type=kind))
            pipeline.set_outputs(*views)
        for batch in running:
            self._feed(pipeline, batch)
        return pipeline

    def _feed(self, pipeline: Pipeline, batch: _Batch) -> None:
        good = [i for i, data in enumerate(batch.encoded) if data is not None]
        boxes = np.tile(
            np.array(_STAND_IN_BOX, np.float32), (len(batch.encoded), len(batch.boxes), 1)
        )  # [B, V, 4]
        boxes[good] = batch.boxes[:, good].swapaxes(0, 1)[
            :, :, [1, 0, 3, 2]
        ]  # DALI's are top, left, bottom, right
        pipeline.feed_input(
            "encoded",
            [np.frombuffer(data, np.uint8) if data else _STAND_IN for data in batch.encoded],
        )
        pipeline.feed_input("boxes", boxes if self.reads_outside else boxes.astype(np.int32))
        pipeline.schedule_run()

    def _outputs(self, pipeline: Pipeline, batch: _Batch) -> list[Tensor] | None:
        """The oldest batch's crops of each view, [B, S, S, 3], which the current stream waits for; None if refused."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            return [from_dlpack(view.as_tensor()) for view in pipeline.outputs(stream)]
        except RuntimeError:
            if batch.raw:
                raise
            return None

    def _mend(self, batch: _Batch, pool: ThreadPoolExecutor) -> None:
        """Leaves out what the strict decode refuses; where that is nothing, DALI gets the pixels of all."""

        def strict(data: bytes | None, row: Any) -> bytes | None:
            return data if data is None or data.startswith(b"P6") else _pixels(data, row)

        pixels = list(pool.map(strict, batch.encoded, self.store.index[batch.samples]))
        kept = [
            data if decoded else None for data, decoded in zip(batch.encoded, pixels, strict=True)
        ]
        batch.raw = kept == batch.encoded
        batch.encoded = pixels if batch.raw else kept

    def _read(
        self, plan: Iterable[tuple[Samples, Boxes]], pool: ThreadPoolExecutor
    ) -> Iterator[_Batch]:
        """The batches of the plan, each read while the one before it is being used."""
        before: tuple[Samples, Boxes, Iterator[list[bytes | None]]] | None = None
        for step in chain(plan, [None]):
            now = step and (
                *step,
                pool.map(self._encoded, np.array_split(step[0], 4 * self.threads)),
            )
            if before:
                samples, boxes, parts = before
                yield _Batch(samples, boxes, [data for part in parts for data in part] or [None])
            before = now

    def _encoded(self, samples: Samples) -> list[bytes | None]:
        rows = zip(self.store.read_batch(samples), self.store.index[samples], strict=True)
        return [data if is_ordinary(data, row) else _pixels(data, row) for data, row in rows]


def _pixels(data: bytes, row: Any) -> bytes | None:
    """An encoded image as a PPM, whose pixels DALI takes as they are; None where it is bad."""
    try:
        pixels = decode(data, int(row["height"]), int(row["width"]))  # [3, H, W]
    except BadImage:
        return None
    return as_ppm(pixels.permute(1, 2, 0).numpy())


def is_ordinary(data: bytes, row: Any) -> bool:
    """Whether it is an 8-bit grey or YCbCr JPEG of the size in the index, whole up to its first scan and at its end:
    not CMYK, nor RGB, since DALI's parser takes all three components for YCbCr, and GPUs may not decode four."""
    size, at = None, 2
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if marker == _SCAN:
            return size == (row["height"], row["width"]) and _END in data[-_END_BYTES:]
        if marker in _FRAMES and size is None and body[:1] == b"\x08" and len(body) in (9, 15):
            if len(body) != 6 + 3 * body[5] or body[6::3] == b"RGB":
                return False
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        elif marker not in _OTHERS or (
            marker == _ADOBE and body[:5] == b"Adobe" and body[11:12] != b"\1"
        ):
            return False
        at += 2 + length
    return False
