"""The decoder for a GPU: NVIDIA DALI, where nvJPEG decodes and the device crops and resizes. The same code on the CPU.

DALI gets only what cannot surprise it: JPEGs of the ordinary kinds whose headers are whole, and all other images as
pixels, decoded here. A header that DALI refuses must never reach it: with batches of 32 and more it then raises while
its threads still work on the batch, and the process dies (DALI 2.4.0).
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

from ..images import BadImage, decode
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import CenterCrop, Recipe
from ..stores import Store
from . import Boxes, Crops

_BATCHES_AHEAD = 2  # in DALI; one more is being read
_END_BYTES = 1024  # a JPEG's end marker stands at most so far before the end of its file: some writers pad
_INTERPOLATION = {"bicubic": types.DALIInterpType.INTERP_CUBIC, "bilinear": types.DALIInterpType.INTERP_LINEAR}
_PPM = b"P6\n%d %d\n255\n"  # width and height of the raw RGB pixels that follow
_STAND_IN, _STAND_IN_BOX = _PPM % (1, 1) + bytes(3), (0, 0, 1, 1)  # for what is bad

# JPEG markers: of frames that every decoder knows (Huffman-coded, sequential or progressive), and of what may stand by
_FRAMES, _SCAN, _ADOBE = (0xC0, 0xC1, 0xC2), 0xDA, 0xEE
_OTHERS = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # Huffman and quantisation tables, restarts, metadata


@dataclass
class _Batch:
    samples: Samples  # [B]
    boxes: Boxes  # [V, B, 4]
    encoded: list[bytes | None]  # [B] as DALI gets them, None for a bad image
    raw: bool = False  # all of them are pixels already: nothing is left that DALI could refuse


class DaliDecoder:
    """See `Decoder`. On a GPU the crops are ready on the current stream; on the CPU they are bit-identical for any
    number of threads. `hw_decoder_load` is the share of images for the GPU's JPEG engine, where it has one."""

    name = "dali"

    def __init__(
        self, store: Store, recipe: Recipe, threads: int, device: torch.device, hw_decoder_load: float, why: str = ""
    ) -> None:
        self.store, self.recipe, self.threads, self.why = store, recipe, threads, why
        self.device, self.hw_decoder_load = device, hw_decoder_load

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        running: deque[_Batch] = deque()
        pipeline, largest = None, 0
        pool = single_threaded_workers(self.threads, "read")

        def finish() -> Crops:
            nonlocal pipeline
            assert pipeline is not None
            while True:
                try:
                    views = self._outputs(pipeline)
                    break
                except RuntimeError:  # it names no sample to rely on, and says that the pipeline is no longer valid
                    if running[0].raw:
                        raise
                pipeline = self._build(largest)
                self._mend(running[0], pool)
                for batch in running:
                    self._feed(pipeline, batch)
            batch = running.popleft()
            crops = torch.stack(views)[:, : len(batch.samples)]  # [V, B, S, S, 3], a copy: DALI keeps its own memory
            return crops, np.array([data is not None for data in batch.encoded], dtype=bool)

        try:
            for batch in self._read(plan, pool):
                if pipeline is None or len(batch.samples) > largest:
                    while running:
                        yield finish()
                    largest = max(1, len(batch.samples))
                    pipeline = self._build(largest)
                running.append(batch)
                self._feed(pipeline, batch)
                if len(running) > _BATCHES_AHEAD:
                    yield finish()
            while running:
                yield finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _build(self, largest: int) -> Pipeline:
        gpu, size, count = self.device.type == "cuda", self.recipe.size, len(self.recipe.views)
        device_id = self.device.index or 0 if gpu else None
        # Without a queue of DALI's own: it runs whatever it is given, in order, and the stream decides how far ahead.
        pipeline = Pipeline(largest, self.threads, device_id, prefetch_queue_depth=1, exec_dynamic=True)
        with pipeline:
            encoded, boxes = (fn.external_source(name=name, device="cpu") for name in ("encoded", "boxes"))
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
                hw_decoder_load=self.hw_decoder_load,
            )
            how = {"size": (size, size), "interp_type": _INTERPOLATION[self.recipe.crop.interpolation]}
            views = []
            for view in range(count):
                start, end = boxes[view, :2], boxes[view, 2:]
                if isinstance(self.recipe.crop, CenterCrop):  # filters across the edges of its box
                    views.append(fn.resize(images, roi_start=start, roi_end=end, antialias=True, **how))
                else:
                    inside = fn.slice(images, start=start, end=end, axes=(0, 1))
                    views.append(fn.resize(inside, antialias=True, **how))
            pipeline.set_outputs(*views)
        return pipeline

    def _feed(self, pipeline: Pipeline, batch: _Batch) -> None:
        good = [i for i, data in enumerate(batch.encoded) if data is not None]
        boxes = np.tile(np.array(_STAND_IN_BOX, dtype=np.float32), (max(1, len(batch.samples)), len(batch.boxes), 1))
        boxes[good] = batch.boxes[:, good, :].transpose(1, 0, 2)[:, :, [1, 0, 3, 2]]  # [B, V, 4] top, left, ...
        whole = boxes if isinstance(self.recipe.crop, CenterCrop) else boxes.astype(np.int32)
        encoded = [np.frombuffer(data or _STAND_IN, dtype=np.uint8) for data in batch.encoded or [None]]
        pipeline.feed_input("encoded", encoded)
        pipeline.feed_input("boxes", whole)
        pipeline.schedule_run()

    def _outputs(self, pipeline: Pipeline) -> list[Tensor]:
        """The oldest batch's crops of each view, [B, S, S, 3]: the current stream waits for them, the host does not."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return [from_dlpack(view.as_tensor()) for view in pipeline.outputs(stream)]

    def _read(self, plan: Iterable[tuple[Samples, Boxes]], pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """The batches of the plan with their bytes, while the next one is being read."""
        waiting: deque[tuple[Samples, Boxes, Iterator[list[bytes | None]]]] = deque()
        for samples, boxes in plan:
            parts = np.array_split(samples, 4 * self.threads)
            waiting.append((samples, boxes, pool.map(self._encoded, parts)))
            if len(waiting) > 1:
                yield _gathered(*waiting.popleft())
        while waiting:
            yield _gathered(*waiting.popleft())

    def _encoded(self, samples: Samples) -> list[bytes | None]:
        """What DALI gets for each sample: its own bytes, or its pixels; None for a bad image."""
        found: list[bytes | None] = []
        for data, row in zip(self.store.read_batch(samples), self.store.index[samples], strict=True):
            ends = data.rfind(b"\xff\xd9", -_END_BYTES) >= 0
            ordinary = ends and ordinary_size(data) == (row["height"], row["width"])
            found.append(data if ordinary else _pixels(data, row))
        return found

    def _mend(self, batch: _Batch, pool: ThreadPoolExecutor) -> None:
        """Leaves out what the strict decode refuses; where it refuses nothing, DALI gets the pixels of all."""
        pixels = list(pool.map(_pixels, batch.encoded, self.store.index[batch.samples]))
        kept = [data if strict else None for data, strict in zip(batch.encoded, pixels, strict=True)]
        batch.raw = kept == batch.encoded
        batch.encoded = pixels if batch.raw else kept


def _gathered(samples: Samples, boxes: Boxes, parts: Iterator[list[bytes | None]]) -> _Batch:
    return _Batch(samples, boxes, [data for part in parts for data in part])


def _pixels(data: bytes | None, row: Any) -> bytes | None:
    """An encoded image of the store as a PPM, which DALI reads exactly; None for a bad one."""
    if data is None or data.startswith(b"P6"):
        return data
    try:
        pixels = decode(data, int(row["height"]), int(row["width"]))  # [3, H, W]
    except BadImage:
        return None
    return _PPM % (pixels.shape[2], pixels.shape[1]) + pixels.permute(1, 2, 0).numpy().tobytes()


def ordinary_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an 8-bit grey or YCbCr JPEG whose segments, up to its first scan, are whole; else None.

    CMYK and RGB are not among them: the GPU's decoders take three components for YCbCr, and do not know four.
    """
    size, at = None, 2
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if len(body) != length - 2:
            return None
        if marker == _SCAN:
            return size
        if marker in _FRAMES:
            known = body[:1] == b"\x08" and len(body) == 6 + 3 * body[5] and body[5] in (1, 3) and body[6::3] != b"RGB"
            if size is not None or not known:
                return None
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        elif marker not in _OTHERS or (marker == _ADOBE and body[:5] == b"Adobe" and body[11:12] != b"\1"):
            return None
        at += 2 + length
    return None
