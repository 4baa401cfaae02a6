"""The portable decoder, in threads: pixels that are Pillow's to the bit, and the resize that torchvision calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from ..images import BadImage, crop, decode
from ..machine import single_threaded_workers
from ..order import Samples
from ..recipe import CenterCrop, Recipe
from ..stores import Store
from . import Boxes, Crops

_BATCHES_AHEAD = 2


class TorchvisionDecoder:
    """See `Decoder`. Holds at most three batches of crops and one decoded image a thread."""

    name = "torchvision"

    def __init__(self, store: Store, recipe: Recipe, threads: int, why: str = "as asked") -> None:
        self.store, self.size, self.threads, self.why = store, recipe.size, threads, why
        self.interpolation = recipe.crop.interpolation
        self.reads_outside = isinstance(recipe.crop, CenterCrop)  # a box inside an image resized as a whole

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        batches: deque[tuple[Tensor, list[Future[bool]]]] = deque()
        pool = single_threaded_workers(self.threads, "decode")
        try:
            for samples, boxes in plan:
                crops = torch.empty((*boxes.shape[:2], self.size, self.size, 3), dtype=torch.uint8)  # [V, B, S, S, 3]
                futures = [pool.submit(self._one, samples, boxes, i, crops) for i in range(len(samples))]
                batches.append((crops, futures))
                if len(batches) > _BATCHES_AHEAD:
                    yield _finished(*batches.popleft())
            while batches:
                yield _finished(*batches.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, samples: Samples, boxes: Boxes, i: int, crops: Tensor) -> bool:
        sample = samples[i : i + 1]
        row = self.store.index[sample[0]]
        try:
            pixels = decode(self.store.read_batch(sample)[0], int(row["height"]), int(row["width"]))
        except BadImage:
            return False
        for view, view_boxes in enumerate(boxes):
            box = view_boxes[i]
            crops[view, i] = crop(pixels, box, self.size, self.interpolation, reads_outside=self.reads_outside)
        return True


def _finished(crops: Tensor, futures: list[Future[bool]]) -> Crops:
    return crops, np.array([future.result() for future in futures], dtype=bool)
