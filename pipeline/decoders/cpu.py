"""The portable decoder, in threads: pixels that are Pillow's to the bit, and the resize that torchvision calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..buffer_pool import BufferPool
from ..images import BadImage, Encoded, crop, decode
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import RandomResizedCrop, Recipe, WholeImage
from ..stores import Store
from .decoder import Boxes, Crops

_BATCHES_AHEAD = 2
_TOGETHER = 4  # images that a thread takes at a time: handing over each alone costs 4% at 224 px


class CpuDecoder:
    """See `Decoder`. Holds at most three batches of crops and one decoded image a thread."""

    name = "cpu"

    def __init__(
        self, store: Store, recipe: Recipe, threads: int, why: str = "as requested"
    ) -> None:
        self.store, self.size, self.threads, self.why = store, recipe.size, threads, why
        self.crop = partial(
            crop,
            size=recipe.size,
            interpolation=recipe.crop.interpolation,
            reads_outside=not isinstance(
                recipe.crop, RandomResizedCrop
            ),  # a box inside an image resized as a whole
            resizes_first=isinstance(recipe.crop, WholeImage),
        )

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        batches: deque[tuple[Tensor, list[Future[list[bool]]]]] = deque()
        pool, memory = single_threaded_workers(self.threads, "decode"), BufferPool()
        try:
            for samples, boxes in plan:
                crops = memory.empty(
                    (*boxes.shape[:2], self.size, self.size, 3), torch.uint8
                )  # [V, B, S, S, 3]
                parts = (
                    slice(first, first + _TOGETHER) for first in range(0, len(samples), _TOGETHER)
                )
                batches.append(
                    (
                        crops,
                        [
                            pool.submit(self._some, samples[p], boxes[:, p], crops[:, p])
                            for p in parts
                        ],
                    )
                )
                if len(batches) > _BATCHES_AHEAD:
                    yield _finished(*batches.popleft())
            while batches:
                yield _finished(*batches.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _some(self, samples: Samples, boxes: Boxes, crops: Tensor) -> list[bool]:
        """Fills in the crops; which of the samples were good."""
        good = []
        for i, (data, row) in enumerate(
            zip(self._encoded(samples), self.store.index[samples], strict=True)
        ):
            try:
                pixels = decode(data, int(row["height"]), int(row["width"]))
            except BadImage:
                good.append(False)
                continue
            for view, box in enumerate(boxes[:, i]):
                crops[view, i] = self.crop(pixels, box)
            good.append(True)
        return good

    def _encoded(self, samples: Samples) -> Sequence[Encoded]:
        return self.store.read_batch(samples)


def _finished(crops: Tensor, futures: list[Future[list[bool]]]) -> Crops:
    return crops, np.array([good for future in futures for good in future.result()], dtype=bool)
