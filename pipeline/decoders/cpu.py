"""The decoder `cpu`: portable, in threads, with the pixels of Pillow and the resize of torchvision.

Decoding and cropping themselves are in `images.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..buffer_pool import BufferPool
from ..images import BadImage, Encoded, crop_and_resize, decode, resize_region, resize_twice
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import RandomResizedCrop, Recipe, WholeImage
from ..stores import Store
from .decoder import Boxes, Crops

_BATCHES_AHEAD = 2
_IMAGES_PER_TASK = 4  # for a thread at a time: with one, the overhead is 4% at 224 px


class _PendingBatch(NamedTuple):
    """A batch that is being decoded."""

    crops: Tensor  # [V, B, S, S, 3]
    good: list[Future[list[bool]]]  # of each part in turn

    def wait(self) -> Crops:
        good = [is_good for part in self.good for is_good in part.result()]
        return self.crops, np.array(good, dtype=bool)


class CpuDecoder:
    """See `Decoder`. Holds at most three batches of crops, and one decoded image per thread."""

    name = "cpu"

    def __init__(
        self, store: Store, recipe: Recipe, threads: int, reason: str = "as requested"
    ) -> None:
        self.store = store
        self.recipe = recipe
        self.threads = threads
        self.reason = reason
        self._crop = _choose_crop(recipe)

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        size = self.recipe.size
        pending: deque[_PendingBatch] = deque()
        pool = single_threaded_workers(self.threads, "decode")
        memory = BufferPool()
        try:
            for samples, boxes in plan:
                crops = memory.empty((*boxes.shape[:2], size, size, 3), torch.uint8)
                futures = []
                for first in range(0, len(samples), _IMAGES_PER_TASK):
                    part = slice(first, first + _IMAGES_PER_TASK)
                    futures.append(
                        pool.submit(self._decode, samples[part], boxes[:, part], crops[:, part])
                    )
                pending.append(_PendingBatch(crops, futures))
                if len(pending) > _BATCHES_AHEAD:
                    yield pending.popleft().wait()
            while pending:
                yield pending.popleft().wait()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, samples: Samples, boxes: Boxes, crops: Tensor) -> list[bool]:
        """Fill in `crops` [V, n, S, S, 3] for n samples, and return which of them are good."""
        images = self._read_encoded(samples)
        rows = self.store.index[samples]
        good = []
        for i, (data, row) in enumerate(zip(images, rows, strict=True)):
            try:
                pixels = decode(data, int(row["height"]), int(row["width"]))
            except BadImage:
                good.append(False)
                continue
            for view, box in enumerate(boxes[:, i]):
                crops[view, i] = self._crop(
                    pixels, box, self.recipe.size, self.recipe.crop.interpolation
                )
            good.append(True)
        return good

    def _read_encoded(self, samples: Samples) -> Sequence[Encoded]:
        return self.store.read_batch(samples)


def _choose_crop(recipe: Recipe) -> Callable[..., Tensor]:
    """How the crop of this recipe is made from its box."""
    if isinstance(recipe.crop, RandomResizedCrop):
        return crop_and_resize
    if isinstance(recipe.crop, WholeImage):
        return resize_twice
    return resize_region
