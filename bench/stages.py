"""The work of each stage from disk to update, on one store and one device.

`Stages` has a method for each stage. Most of them are generators that work without end and yield
the number of images that they have just done; `Clock` in `timing.py` measures their rates, and
`stage_benchmark.py` measures all of them in order. All use the parts of `pipeline` and `model` that
training uses: nothing is imitated.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import model
from experiment import ModelConfig, OptimConfig
from pipeline import (
    Loader,
    LoaderOptions,
    MemoryStore,
    Recipe,
    Store,
    Subset,
    barlow_twins,
    open_loader,
)
from pipeline.decoders import Boxes
from pipeline.distort import distort
from pipeline.formats.record_store import RecordStore
from pipeline.machine import single_threaded_workers
from pipeline.order import Samples

from .timing import Workload, one_core
from .training_step import StepVariant, TrainingStep, build_step

_ENDLESS = 1 << 40  # steps
# The first steps are slower: memory is allocated, and on a GPU the network is compiled.
_FIRST_STEPS = 5
# Images that a thread reads at a time: handing over single ones would cost more than reading them.
_READ_AT_ONCE = 16


@dataclass(frozen=True)
class StageSettings:
    """What the stages work on."""

    store: Store
    size: int  # side of a view, pixels
    batch_size: int
    decoder: str
    threads: int  # of this rank
    device: torch.device
    network: ModelConfig
    optim: OptimConfig


class Stages:
    """The workload of each stage.

    Every rank does the same work, except for the cold read: there each rank reads its own share, so
    that together they read every file once.

    Args:
        settings: The data, the device and the network.
        rank: This process.
        world_size: The number of processes that take part.
    """

    def __init__(self, settings: StageSettings, rank: int = 0, world_size: int = 1) -> None:
        self.settings = settings
        self.device = settings.device
        store = settings.store
        every_sample = np.arange(len(store))
        self.own_samples = np.random.default_rng(0).permutation(len(store))[rank::world_size]
        self.recipe = barlow_twins(settings.size)
        self.encoded = store.read_batch(every_sample)
        names = [store.name(sample) for sample in range(len(store))]
        self.memory = MemoryStore(self.encoded, names)
        self.loader = self._open(store, self.recipe)

    def _open(self, store: Store, recipe: Recipe, threads: int | None = None) -> Loader:
        options = LoaderOptions(
            batch_size=self.settings.batch_size,
            decoder=self.settings.decoder,
            threads=threads or self.settings.threads,
            device=self.device,
        )
        return open_loader(store, recipe, options)

    # Reading

    def plan(self) -> Generator[int, None, None]:
        """The order, the random parameters and the labels of each batch."""
        labels = self.settings.store.index["label"]
        for step in self.loader.plan(0, _ENDLESS):
            torch.from_numpy(labels[step.samples].astype(np.int64))
            yield len(step.samples)

    def cold_read(self, threads: int) -> Workload:
        """Read the encoded images of this rank, each once. Call `forget_files` before."""
        images_per_thread = -(-len(self.own_samples) // threads)
        at_once = min(_READ_AT_ONCE, images_per_thread)

        def work() -> Generator[int, None, None]:
            yield from (0, 0)  # no warm-up: every image counts
            with _reader_threads(threads) as pool:
                yield from self._read_own(pool, at_once)

        return work

    def warm_read(self) -> Generator[int, None, None]:
        """Read the encoded images of this rank again and again."""
        with _reader_threads(self.settings.threads) as pool:
            while True:
                yield from self._read_own(pool, _READ_AT_ONCE)

    def _read_own(self, pool: ThreadPoolExecutor, at_once: int) -> Iterator[int]:
        starts = range(0, len(self.own_samples), at_once)
        parts = [self.own_samples[start : start + at_once] for start in starts]
        return map(len, pool.map(self.settings.store.read_batch, parts))

    def forget_files(self) -> None:
        """Ask the system to drop the images from its file cache: the next read is from the disk."""
        os.sync()  # pages that are not yet written cannot be dropped
        for path in _files_of(self.settings.store):
            with suppress(OSError), open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fraction_from_disk(self) -> float | None:
        """The fraction of the images that a cold read really reads from the disk.

        None if the system does not report it.
        """
        self.forget_files()
        before = bytes_read_from_disk()
        size = sum(len(data) for data in self.settings.store.read_batch(self.own_samples))
        after = bytes_read_from_disk()
        if before is None or after is None:
            return None
        return min(1.0, (after - before) / size)

    # Decoding

    def decode(self) -> Generator[int, None, None]:
        """Decode whole images from memory. The crop of each is a single pixel, at no cost."""
        whole_image_box = np.array((0, 0, 1, 1), dtype=np.float32)
        boxes = np.broadcast_to(whole_image_box, (1, self.settings.batch_size, 4))
        recipe = replace(self.recipe, size=1, views=self.recipe.views[:1])
        plan = ((step.samples, boxes) for step in self.loader.plan(0, _ENDLESS))
        yield from self._decode_plan(recipe, plan)

    def decode_and_crop(self) -> Generator[int, None, None]:
        """Decode images from memory, and crop and resize each twice."""
        plan = ((step.samples, step.params.boxes) for step in self.loader.plan(0, _ENDLESS))
        yield from self._decode_plan(self.recipe, plan)

    def _decode_plan(
        self, recipe: Recipe, plan: Iterable[tuple[Samples, Boxes]]
    ) -> Generator[int, None, None]:
        decoder = self._open(self.memory, recipe).decoder
        with closing(decoder.stream(plan)) as stream:
            for _, good in stream:
                yield len(good)

    # Distorting and copying

    def distort(self) -> Generator[int, None, None]:
        """Turn crops on the device into finished views."""
        crops = self._decode_one_batch().to(self.device)
        pool = None
        if self.device.type == "cpu":
            pool = single_threaded_workers(self.settings.threads, "distort")
        try:
            for step in self.loader.plan(0, _ENDLESS):
                distort(crops, step.params, self.recipe, pool=pool)
                yield len(step.samples)
        finally:
            if pool is not None:
                pool.shutdown()

    def copy(self) -> Generator[int, None, None]:
        """Copy crops from pinned memory to the device."""
        crops = self._decode_one_batch().cpu().pin_memory()
        while True:
            crops.to(self.device, non_blocking=True)
            yield crops.shape[1]

    def _decode_one_batch(self) -> Tensor:
        """A batch of crops from the decoder, uint8 [2, B, S, S, 3]."""
        step = next(self.loader.plan(0, 1))
        decoder = self._open(self.memory, self.recipe).decoder
        with closing(decoder.stream(iter([(step.samples, step.params.boxes)]))) as stream:
            crops, _ = next(stream)
        return crops

    # Several stages at once

    def feed(self) -> Generator[int, None, None]:
        """Everything before the training step: from cached files to views on the device."""
        yield from self._count_images(self.loader)

    def feed_on_one_core(self) -> Generator[int, None, None]:
        """The feed on one core."""
        with one_core():
            loader = self._open(self.settings.store, self.recipe, threads=1)
            yield from self._count_images(loader)

    def _count_images(self, loader: Loader) -> Generator[int, None, None]:
        with closing(loader.steps(0, _ENDLESS)) as batches:
            for batch in batches:
                yield len(batch.samples)

    def step(self) -> Generator[int, None, None]:
        """Take training steps on two batches of views that are already on the device."""
        views = self._random_views(4)
        for view_a, view_b in cycle((views[:2], views[2:])):
            self.train(view_a, view_b)
            yield len(view_a)

    def end_to_end(self) -> Generator[int, None, None]:
        """The feed and the training step at the same time, as in training."""
        with closing(self.loader.steps(0, _ENDLESS)) as batches:
            for batch in batches:
                self.train(*batch.views)
                yield len(batch.samples)

    @cached_property
    def train(self) -> TrainingStep:
        """The training step. It is built once, compiled if `train.py` would compile it."""
        model.prepare_device(self.device, deterministic=False)
        compile_mode, _ = model.choose_compilation("auto", self.device)
        variant = StepVariant(
            name="train.py",
            dtype=model.choose_precision("auto", self.device),
            layout=torch.channels_last,
            compile_mode=compile_mode,
            one_pass=compile_mode is not None,
        )
        step = build_step(self.settings.network, self.settings.optim, variant, self.device)
        for _ in range(_FIRST_STEPS):
            step(*self._random_views(2))
        return step

    def _random_views(self, count: int) -> list[Tensor]:
        """Views [B, 3, S, S]."""
        size = self.settings.size
        shape = (self.settings.batch_size, 3, size, size)
        views = [torch.randn(shape, device=self.device) for _ in range(count)]
        return [view.to(memory_format=torch.channels_last) for view in views]


def _files_of(store: Store) -> Iterable[str | Path]:
    """The files that are opened to read the images of a store."""
    whole = store
    while isinstance(whole, Subset):
        whole = whole.store
    if isinstance(whole, RecordStore):
        return whole.files
    return [store.name(sample) for sample in range(len(store))]


@contextmanager
def _reader_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def bytes_read_from_disk() -> int | None:
    """The bytes that this process has read from a disk; None if the system does not report it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return None
