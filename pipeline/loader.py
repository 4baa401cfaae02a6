"""Store, order, recipe, decoder and distortions tied together: batches that are ready for the network."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decoders import Boxes, Decoder
from .distort import distort
from .images import BadImage, decode
from .machine import BufferPool, single_threaded_workers, usable_cores
from .options import LoaderOptions
from .order import (
    BLOCKS_MIXED,
    Samples,
    block_order,
    epoch_order,
    replacements,
    step_positions,
    steps_per_epoch,
)
from .recipe import Recipe, ViewParams, draw
from .stores import Store

_BATCHES_READY = 2  # distorted batches that wait for the consumer
_FETCHED = (
    256  # samples that the store is asked to fetch at once: who closes the loader waits for no more
)
_BAD_IN_A_ROW = (
    1000  # bad images without a good one between them: no longer a few that can be replaced
)


class Batch(NamedTuple):
    """What one training step needs."""

    views: tuple[
        Tensor, ...
    ]  # each [B, 3, S, S], channels_last, normalised, on the loader's device
    labels: Tensor  # int64 [B], -1 where there is none; on the device
    samples: Tensor  # int64 [B], positions in the store; on the host


class PlannedBatch(NamedTuple):
    """What is decided about a step before anything is read: a function of the step, and of which images are bad."""

    epoch: int
    order: Samples  # of the whole epoch
    positions: Samples  # [B] in that order
    samples: Samples  # [B]
    params: ViewParams


class Loader:
    """Batches of a store, the same for any decoder and number of threads.

    With `shuffle`, every epoch is a permutation in batches of one size and the rest is dropped; a sample that turns
    out bad is replaced by a later one of the same epoch. Without it (evaluation) samples come in the store's order,
    the last batch is short, and a bad sample is left out. `bad` maps each bad sample found so far to the reason.

    `shuffle_block` is the block of `epoch_order`, in samples. A store of records is then fetched ahead, one window of
    blocks while another is used: two have to fit into the system's file cache. The ranks of a machine share them.
    """

    def __init__(
        self, store: Store, recipe: Recipe, decoder: Decoder, options: LoaderOptions
    ) -> None:
        if options.shuffle and len(store) < options.global_batch_size:
            raise ValueError(
                f"{len(store)} images are fewer than one batch of {options.global_batch_size}: take a batch size of "
                f"at most {len(store) // options.world_size}, or more images"
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
        n, global_batch = len(self.store), self.options.global_batch_size
        return steps_per_epoch(n, global_batch) if self.options.shuffle else -(-n // global_batch)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from its step `first_step` on."""
        return self.steps(epoch * len(self) + first_step, (epoch + 1) * len(self))

    def steps(self, first: int, last: int) -> Generator[Batch, None, None]:
        """The batches of steps first <= step < last, counted from the first of epoch 0, without a pause between epochs.

        They are made ahead in a thread; closing the iterator (or dropping it) ends that and everything it started.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_BATCHES_READY)
        stop = threading.Event()
        stream = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                with (
                    closing(self._batches(first, last)) as batches,
                    torch.cuda.stream(stream),
                ):  # nothing for None
                    for batch in batches:
                        if (
                            stream is not None
                        ):  # ready means made: waiting for a batch then includes distorting it
                            stream.synchronize()
                        put(batch)
                        if stop.is_set():
                            return
                put(None)
            except BaseException as error:  # raised again in the consumer's thread
                put(error)

        def get() -> Batch | BaseException | None:
            while True:
                try:
                    return ready.get(timeout=1)
                except queue.Empty:
                    if not thread.is_alive() and ready.empty():
                        return RuntimeError("the thread that makes the batches is gone")

        thread = threading.Thread(target=produce, name="twinfeed-loader", daemon=True)
        thread.start()
        try:
            while (item := get()) is not None:
                if isinstance(item, Exception):
                    raise item
                if isinstance(
                    item, BaseException
                ):  # a SystemExit of some library's must not end the run in silence
                    raise RuntimeError(f"a thread of the loader ended with {item!r}") from item
                if (
                    stream is not None
                ):  # their memory belongs to the loader's stream, and is now in use on this one
                    for tensor in (*item.views, item.labels):
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield item
        finally:
            stop.set()
            thread.join()

    def plan(self, first: int, last: int) -> Generator[PlannedBatch, None, None]:
        """What is decided about the steps first <= step < last before anything is read."""
        order, ordered_epoch = np.arange(len(self.store), dtype=np.int64), -1
        for step in range(first, last):
            epoch, step_of_epoch = divmod(step, len(self))
            if self.options.shuffle and epoch != ordered_epoch:
                order = epoch_order(
                    len(self.store), self.options.seed, epoch, self.options.shuffle_block
                )
                ordered_epoch = epoch
            positions = step_positions(
                step_of_epoch, self.options.batch_size, self.options.rank, self.options.world_size
            )
            yield self._plan(epoch, order, positions[positions < len(order)])

    def _batches(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Plan -> decode -> repair -> distort. The plan runs ahead of the batches by as much as the decoder likes."""
        planned: deque[PlannedBatch] = deque()
        steps = self.plan(first, last)
        if self.options.shuffle and self.options.shuffle_block and hasattr(self.store, "prefetch"):
            steps = self._fetch_ahead(steps, self.options.shuffle_block, self.store.prefetch)

        def plan() -> Iterator[tuple[Samples, Boxes]]:
            for step in steps:
                planned.append(step)
                yield step.samples, step.params.boxes

        stream = self.decoder.stream(plan())
        pool = (
            single_threaded_workers(self.threads, "distort") if self.device.type == "cpu" else None
        )
        memory = BufferPool()
        try:
            for crops, good in stream:
                step = planned.popleft()
                if not good.all():
                    step, crops = self._repair(step, crops, good)
                if len(step.samples):
                    yield self._finish(step, crops, pool, memory)
        finally:
            stream.close()
            steps.close()
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _fetch_ahead(
        self, steps: Iterator[PlannedBatch], block: int, prefetch: Callable[[int, int], None]
    ) -> Generator[PlannedBatch, None, None]:
        """The same steps; the store fetches each window of blocks while the one before it is used, once an epoch.

        In a thread, which waits for the disk. An error there is nobody's loss: reading the samples meets it again.
        """
        n, epoch, asked = len(self.store), -1, 0  # asked: so many blocks of that epoch's order
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            for step in steps:
                first, last = (
                    BLOCKS_MIXED * (int(p) // (BLOCKS_MIXED * block))
                    for p in step.positions[[0, -1]]
                )
                if step.epoch != epoch:
                    epoch, asked, order = (
                        step.epoch,
                        first,
                        block_order(n, self.options.seed, step.epoch, block),
                    )
                until = (
                    last + 2 * BLOCKS_MIXED
                )  # this window and the next, which begins sooner behind the short block
                for number in order[asked:until].tolist():
                    end = min((number + 1) * block, n)
                    for sample in range(number * block, end, _FETCHED):
                        pool.submit(prefetch, sample, min(sample + _FETCHED, end))
                asked = until
                yield step
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(self, epoch: int, order: Samples, positions: Samples) -> PlannedBatch:
        """The samples at those positions, known bad ones replaced (or left out, without `shuffle`), and their draws."""
        samples = order[positions]
        if self.bad and self.options.shuffle:
            taken: set[int] = set()
            for i, sample in enumerate(samples):
                if int(sample) in self.bad:
                    samples[i] = self._stand_in(int(positions[i]), order, taken)
                    taken.add(int(samples[i]))
        elif self.bad:
            samples = samples[[int(sample) not in self.bad for sample in samples]]
        rows = self.store.index[samples]
        params = draw(self.recipe, self.options.seed, epoch, samples, rows["height"], rows["width"])
        return PlannedBatch(epoch, order, positions, samples, params)

    def _stand_in(self, position: int, order: Samples, taken: set[int]) -> int:
        for candidate in replacements(position, len(order), self.options.global_batch_size):
            sample = int(order[candidate])
            if sample not in self.bad and sample not in taken:
                return sample
        raise self._too_many_bad("no image is left to stand in for bad ones")

    def _too_many_bad(self, what: str) -> ValueError:
        first = "; ".join(f"{self.store.name(s)}: {why}" for s, why in list(self.bad.items())[:3])
        found = f"{len(self.bad)} of {len(self.store)} cannot be decoded"
        return ValueError(f"{what}: {found}, the first: {first}")

    def _repair(
        self, step: PlannedBatch, crops: Tensor, good: NDArray[np.bool_]
    ) -> tuple[PlannedBatch, Tensor]:
        """The same step without its bad samples: replaced, or left out, until all are good."""
        tried, in_a_row = good, 0
        while True:
            for sample in step.samples[~good]:
                self.bad[int(sample)] = self._reason(int(sample))
            in_a_row = 0 if tried.any() else in_a_row + len(tried)
            if self.options.shuffle and in_a_row >= _BAD_IN_A_ROW:
                raise self._too_many_bad(f"{in_a_row} images in a row are bad")
            repaired = self._plan(step.epoch, step.order, step.positions)
            if not self.options.shuffle:
                return repaired, crops[:, torch.from_numpy(np.flatnonzero(good)).to(crops.device)]
            redo = np.flatnonzero(repaired.samples != step.samples)
            decoded = self.decoder.stream(
                iter([(repaired.samples[redo], repaired.params.boxes[:, redo])])
            )
            new_crops, tried = next(decoded)
            decoded.close()
            crops[:, torch.from_numpy(redo).to(crops.device)] = new_crops
            good = np.ones(len(good), dtype=bool)
            good[redo] = tried
            step = repaired
            if good.all():
                return step, crops

    def _reason(self, sample: int) -> str:
        row = self.store.index[sample]
        try:
            decode(
                self.store.read_batch(np.array([sample]))[0], int(row["height"]), int(row["width"])
            )
        except BadImage as error:
            return str(error)
        return "it did not decode, though it does now"

    def _finish(
        self, step: PlannedBatch, crops: Tensor, pool: ThreadPoolExecutor | None, memory: BufferPool
    ) -> Batch:
        labels = torch.from_numpy(self.store.index["label"][step.samples].astype(np.int64))
        if pool is None:
            crops, labels = (  # a decoder on the device has left its crops there
                t
                if t.device.type == self.device.type
                else t.pin_memory().to(self.device, non_blocking=True)
                for t in (crops, labels)
            )
        views = distort(crops, step.params, self.recipe, self.options.dtype, pool, memory)
        return Batch(views, labels, torch.from_numpy(step.samples))
