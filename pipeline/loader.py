"""`Loader`: ties store, order, recipe, decoder and distortions together into batches.

A step passes through four stages: plan (samples and random parameters) -> decode and crop ->
replace bad samples -> distort.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .background import BackgroundIterator
from .buffer_pool import BufferPool
from .decoders import Boxes, Decoder
from .distort import distort
from .draw import ViewParams, draw
from .images import BadImage, decode
from .machine import single_threaded_workers, usable_cores
from .options import LoaderOptions
from .order import Samples, epoch_order, replacements, step_positions, steps_per_epoch
from .prefetch import Prefetcher, PrefetchPlan
from .recipe import Recipe
from .stores import Store

_BATCHES_READY = 2  # finished batches that wait for the consumer
_BAD_IN_A_ROW = 1000  # consecutive bad images at which the loader gives up replacing them


class Batch(NamedTuple):
    """The images of one step."""

    views: tuple[Tensor, ...]  # each [B, 3, S, S], channels_last, normalised; on the device
    labels: Tensor  # int64 [B], -1 for images without a label; on the device
    samples: Tensor  # int64 [B], positions in the store; on the CPU


class PlannedBatch(NamedTuple):
    """What is decided about a step before any image is read.

    It depends on the step, and on which images are known to be bad.
    """

    epoch: int
    order: Samples  # of the whole epoch, [n]
    positions: Samples  # in that order, [B]
    samples: Samples  # [B]
    params: ViewParams


class Loader:
    """Iterates over the batches of a store, from any step on.

    The batches depend only on the store, the recipe, the options and the decoder, not on the
    number of threads. A bad sample (an image that does not decode) is handled as
    `LoaderOptions.shuffle` describes.

    Args:
        store: The encoded images.
        recipe: How an image becomes views.
        decoder: Decodes and crops the images; see `open_decoder`.
        options: Batch size, order, device and so on.

    Attributes:
        bad: The bad samples that were found so far, and for each the reason.

    Raises:
        ValueError: If there are fewer images than one batch, and samples are shuffled.
    """

    def __init__(
        self, store: Store, recipe: Recipe, decoder: Decoder, options: LoaderOptions
    ) -> None:
        if options.shuffle and len(store) < options.global_batch_size:
            raise ValueError(
                f"{len(store)} images are fewer than one batch of {options.global_batch_size}: "
                f"use a batch of {len(store)} or less (on all ranks together), or more images"
            )
        self.store = store
        self.recipe = recipe
        self.decoder = decoder
        self.options = options
        self.threads = options.threads or usable_cores()
        self.device = torch.device(options.device)
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        n = len(self.store)
        global_batch = self.options.global_batch_size
        if self.options.shuffle:
            return steps_per_epoch(n, global_batch)
        return -(-n // global_batch)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch, starting at its step `first_step`."""
        return self.steps(epoch * len(self) + first_step, (epoch + 1) * len(self))

    def steps(self, first: int, last: int) -> Generator[Batch, None, None]:
        """The batches of the steps first <= step < last, counted from the start of epoch 0.

        There is no pause between epochs. The batches are made ahead of time in a thread. Closing or
        dropping the iterator ends that thread and everything that it has started.
        """
        stream = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)
        batches = BackgroundIterator(self._batches_on(stream, first, last), _BATCHES_READY)
        try:
            for batch in batches:
                if stream is not None:
                    # The tensors belong to the loader's stream, and are used on the current one.
                    for tensor in (*batch.views, batch.labels):
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield batch
        finally:
            batches.close()

    def plan(self, first: int, last: int) -> Generator[PlannedBatch, None, None]:
        """The plans of the steps first <= step < last."""
        options = self.options
        order = np.arange(len(self.store), dtype=np.int64)
        ordered_epoch = -1
        for step in range(first, last):
            epoch, step_of_epoch = divmod(step, len(self))
            if options.shuffle and epoch != ordered_epoch:
                order = epoch_order(len(self.store), options.seed, epoch, options.shuffle_block)
                ordered_epoch = epoch
            positions = step_positions(
                step_of_epoch, options.batch_size, options.rank, options.world_size
            )
            yield self._plan_step(epoch, order, positions[positions < len(order)])

    def _plan_step(self, epoch: int, order: Samples, positions: Samples) -> PlannedBatch:
        """The samples at `positions`, without those known to be bad, and their parameters."""
        samples = order[positions]
        if self.bad:
            if self.options.shuffle:
                samples = self._with_replacements(samples, order, positions)
            else:
                samples = samples[[int(sample) not in self.bad for sample in samples]]
        rows = self.store.index[samples]
        params = draw(self.recipe, self.options.seed, epoch, samples, rows["height"], rows["width"])
        return PlannedBatch(epoch, order, positions, samples, params)

    def _batches_on(
        self, stream: torch.cuda.Stream | None, first: int, last: int
    ) -> Generator[Batch, None, None]:
        """The batches, made on that CUDA stream, or on the CPU for None."""
        with closing(self._batches(first, last)) as batches, torch.cuda.stream(stream):
            for batch in batches:
                if stream is not None:
                    # A batch is passed on when its distortions are done, not just launched, so
                    # that the consumer's waiting time includes them.
                    stream.synchronize()
                yield batch

    def _batches(self, first: int, last: int) -> Generator[Batch, None, None]:
        """The stages of the loader in turn."""
        planned: deque[PlannedBatch] = deque()  # the decoder runs some steps ahead of the batches
        steps = self._plan_and_prefetch(first, last)

        def crop_plan() -> Iterator[tuple[Samples, Boxes]]:
            for step in steps:
                planned.append(step)
                yield step.samples, step.params.boxes

        decoded = self.decoder.stream(crop_plan())
        pool = None
        if self.device.type == "cpu":
            pool = single_threaded_workers(self.threads, "distort")
        memory = BufferPool()
        try:
            for crops, good in decoded:
                step = planned.popleft()
                if not good.all():
                    step, crops = self._without_bad(step, crops, good)
                if len(step.samples) > 0:
                    yield self._finish(step, crops, pool, memory)
        finally:
            decoded.close()
            steps.close()
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _plan_and_prefetch(self, first: int, last: int) -> Generator[PlannedBatch, None, None]:
        """The plans of the steps. With a block-wise shuffle, the store reads ahead of them."""
        options = self.options
        steps = self.plan(first, last)
        if not (options.shuffle and options.shuffle_block and hasattr(self.store, "prefetch")):
            yield from steps
            return

        plan = PrefetchPlan(len(self.store), options.seed, options.shuffle_block)
        with closing(Prefetcher(self.store.prefetch, plan)) as prefetcher:
            for step in steps:
                prefetcher.start(step.epoch, step.positions)
                yield step

    def _finish(
        self, step: PlannedBatch, crops: Tensor, pool: ThreadPoolExecutor | None, memory: BufferPool
    ) -> Batch:
        """Copy the crops and labels to the device, if they are not there, and distort the crops."""
        labels = torch.from_numpy(self.store.index["label"][step.samples].astype(np.int64))
        labels = self._on_device(labels)
        crops = self._on_device(crops)
        views = distort(crops, step.params, self.recipe, self.options.dtype, pool, memory)
        return Batch(views, labels, torch.from_numpy(step.samples))

    def _on_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # Bad samples

    def _with_replacements(self, samples: Samples, order: Samples, positions: Samples) -> Samples:
        """`samples` with every one that is known to be bad replaced by another one."""
        samples = samples.copy()
        used: set[int] = set()
        for i, sample in enumerate(samples):
            if int(sample) in self.bad:
                replacement = self._find_replacement(int(positions[i]), order, used)
                samples[i] = replacement
                used.add(replacement)
        return samples

    def _find_replacement(self, position: int, order: Samples, used: set[int]) -> int:
        for candidate in replacements(position, len(order), self.options.global_batch_size):
            sample = int(order[candidate])
            if sample not in self.bad and sample not in used:
                return sample
        raise self._too_many_bad("no image is left to replace bad ones")

    def _without_bad(
        self, step: PlannedBatch, crops: Tensor, good: NDArray[np.bool_]
    ) -> tuple[PlannedBatch, Tensor]:
        """The step and its crops with the bad samples left out, or replaced if shuffled."""
        if self.options.shuffle:
            return self._replace_bad(step, crops, good)
        self._remember_bad(step.samples[~good])
        kept = torch.from_numpy(np.flatnonzero(good)).to(crops.device)
        return self._plan_step(step.epoch, step.order, step.positions), crops[:, kept]

    def _replace_bad(
        self, step: PlannedBatch, crops: Tensor, good: NDArray[np.bool_]
    ) -> tuple[PlannedBatch, Tensor]:
        """Replace bad samples, and replacements that are bad themselves, until all are good."""
        last_decoded = good
        bad_in_a_row = 0
        while not good.all():
            self._remember_bad(step.samples[~good])
            bad_in_a_row = 0 if last_decoded.any() else bad_in_a_row + len(last_decoded)
            if bad_in_a_row >= _BAD_IN_A_ROW:
                raise self._too_many_bad(f"{bad_in_a_row} consecutive images cannot be decoded")

            new_step = self._plan_step(step.epoch, step.order, step.positions)
            changed = np.flatnonzero(new_step.samples != step.samples)
            new_crops, last_decoded = self._decode(
                new_step.samples[changed], new_step.params.boxes[:, changed]
            )
            crops[:, torch.from_numpy(changed).to(crops.device)] = new_crops
            good = np.ones(len(new_step.samples), dtype=bool)
            good[changed] = last_decoded
            step = new_step
        return step, crops

    def _decode(self, samples: Samples, boxes: Boxes) -> tuple[Tensor, NDArray[np.bool_]]:
        """Decode these samples outside of the stream of steps."""
        with closing(self.decoder.stream([(samples, boxes)])) as decoded:
            return next(decoded)

    def _remember_bad(self, samples: Samples) -> None:
        for sample in samples.tolist():
            self.bad[sample] = self._decoding_error(sample)

    def _decoding_error(self, sample: int) -> str:
        row = self.store.index[sample]
        data = self.store.read_batch(np.array([sample]))[0]
        try:
            decode(data, int(row["height"]), int(row["width"]))
        except BadImage as error:
            return str(error)
        return "it failed once, but can be decoded now"

    def _too_many_bad(self, problem: str) -> ValueError:
        examples = [
            f"{self.store.name(sample)}: {reason}" for sample, reason in list(self.bad.items())[:3]
        ]
        return ValueError(
            f"{problem}: {len(self.bad)} of {len(self.store)} cannot be decoded, "
            f"for example: {'; '.join(examples)}"
        )
