"""The ladder from disk to update: each rung measured alone, then all of them at once, on one store and one device."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import model
from experiment.config import ModelConfig, OptimConfig
from pipeline import Loader, LoaderOptions, Recipe, Store, Subset, barlow_twins, open_loader
from pipeline.distort import distort
from pipeline.formats.record_store import RecordStore
from pipeline.machine import single_threaded_workers
from pipeline.order import Samples

from .timing import Work, one_core

_ENDLESS = 1 << 40  # steps
_FIRST_STEPS = (
    5  # of a network, which are slower: memory is found for them (and they are compiled, on a GPU)
)
_READ_AT_ONCE = 16  # images that a thread reads on end: handing over single ones would cost more than reading them


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    store: Store
    size: int
    batch_size: int
    decoder: str
    threads: int  # of this rank
    device: torch.device
    network: ModelConfig
    optim: OptimConfig


class InMemory:
    """Encoded images as a store: what remains to be measured is everything but the disk."""

    def __init__(self, encoded: Sequence[bytes], index: NDArray[Any]) -> None:
        self.classes: list[str] = []
        self.rejects: dict[str, str] = {}
        self.index, self._encoded = index, encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self._encoded[sample] for sample in samples]

    def name(self, sample: int) -> str:
        return f"image {sample} in memory"


class Ladder:
    """The rungs as work for a `Clock`. Each yields numbers of images done, without end where that can be.

    Every rank does the same work, but the cold read, of which each does its share: together they read a file once.
    """

    def __init__(self, setting: Setting, rank: int = 0, world: int = 1) -> None:
        self.setting, self.device = setting, setting.device
        self.mine = np.random.default_rng(0).permutation(len(setting.store))[rank::world]
        self.recipe = barlow_twins(setting.size)
        self.memory = InMemory(
            setting.store.read_batch(np.arange(len(setting.store))), setting.store.index
        )
        self.loader = self.open(setting.store, self.recipe)

    def open(self, store: Store, recipe: Recipe, threads: int | None = None) -> Loader:
        s = self.setting
        threads = threads or s.threads
        return open_loader(
            store,
            recipe,
            LoaderOptions(
                batch_size=s.batch_size, decoder=s.decoder, threads=threads, device=self.device
            ),
        )

    def plan(self) -> Generator[int, None, None]:
        for step in self.loader.plan(0, _ENDLESS):
            torch.from_numpy(self.setting.store.index["label"][step.samples].astype(np.int64))
            yield len(step.samples)

    def cold_read(self, threads: int) -> Work:
        """The encoded images of this rank, each once, in `threads` threads; `forget_files` has to come before."""
        at_once = min(_READ_AT_ONCE, -(-len(self.mine) // threads))

        def work() -> Generator[int, None, None]:
            yield from (0, 0)  # nothing to warm up: every image counts
            with _readers(threads) as pool:
                yield from self._read(pool, at_once)

        return work

    def warm_read(self) -> Generator[int, None, None]:
        """All of them over and over again."""
        with _readers(self.setting.threads) as pool:
            while True:
                yield from self._read(pool, _READ_AT_ONCE)

    def _read(self, pool: ThreadPoolExecutor, at_once: int) -> Iterator[int]:
        parts = [self.mine[i : i + at_once] for i in range(0, len(self.mine), at_once)]
        return map(len, pool.map(self.setting.store.read_batch, parts))

    def forget_files(self) -> None:
        """Asks the system to drop the images from its memory, so that the next read goes to the disk."""
        os.sync()  # what is not yet written cannot be dropped
        for path in _files(self.setting.store):
            with suppress(OSError), open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def from_disk(self) -> float | None:
        """What fraction of the images then comes from the disk indeed; None where the system does not say."""
        self.forget_files()
        before = _bytes_from_disk()
        size = sum(map(len, self.setting.store.read_batch(self.mine)))
        after = _bytes_from_disk()
        return None if before is None or after is None else min(1.0, (after - before) / size)

    def decode(self) -> Generator[int, None, None]:
        """Whole images decoded from memory; of each a single pixel is cut out, in the place of the crops."""
        one_pixel = np.broadcast_to(
            np.array((0, 0, 1, 1), dtype=np.float32), (1, self.setting.batch_size, 4)
        )
        recipe = replace(self.recipe, size=1, views=self.recipe.views[:1])
        yield from self._stream(recipe, lambda boxes: one_pixel)

    def crops(self) -> Generator[int, None, None]:
        """Decoded from memory, and cut and resized twice."""
        yield from self._stream(self.recipe, lambda boxes: boxes)

    def _stream(self, recipe: Recipe, change: Callable[[Any], Any]) -> Generator[int, None, None]:
        decoder = self.open(self.memory, recipe).decoder
        plan = ((step.samples, change(step.params.boxes)) for step in self.loader.plan(0, _ENDLESS))
        with closing(decoder.stream(plan)) as stream:
            for _, good in stream:
                yield len(good)

    def some_crops(self) -> tuple[Tensor, Any]:
        """A batch of crops as the decoder gives them, and what is to be done to them."""
        step = next(self.loader.plan(0, 1))
        decoder = self.open(self.memory, self.recipe).decoder
        with closing(decoder.stream(iter([(step.samples, step.params.boxes)]))) as stream:
            return next(stream)[0], step.params

    def distort(self) -> Generator[int, None, None]:
        """Resident crops to finished views."""
        crops, _ = self.some_crops()
        crops = crops.to(self.device)
        pool = (
            single_threaded_workers(self.setting.threads, "distort")
            if self.device.type == "cpu"
            else None
        )
        try:
            for step in self.loader.plan(0, _ENDLESS):
                distort(crops, step.params, self.recipe, pool=pool)
                yield len(step.samples)
        finally:
            if pool:
                pool.shutdown()

    def copy(self) -> Generator[int, None, None]:
        """Crops in pinned memory to the device."""
        crops = self.some_crops()[0].cpu().pin_memory()
        while True:
            crops.to(self.device, non_blocking=True)
            yield crops.shape[1]

    def feed(self) -> Generator[int, None, None]:
        """Everything before the step, from warm files to finished views on the device."""
        with closing(self.loader.steps(0, _ENDLESS)) as batches:
            for batch in batches:
                yield len(batch.samples)

    def feed_on_one_core(self) -> Generator[int, None, None]:
        with one_core():
            loader = self.open(self.setting.store, self.recipe, threads=1)
            with closing(loader.steps(0, _ENDLESS)) as batches:
                for batch in batches:
                    yield len(batch.samples)

    def step(self) -> Generator[int, None, None]:
        """Training steps on two batches of views that are there already."""
        views = self.some_views(4)
        for view_a, view_b in cycle((views[:2], views[2:])):
            self.train(view_a, view_b)
            yield len(view_a)

    def some_views(self, count: int) -> list[Tensor]:
        shape = (self.setting.batch_size, 3, self.setting.size, self.setting.size)
        return [
            torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
            for _ in range(count)
        ]

    def end_to_end(self) -> Generator[int, None, None]:
        """The feed and the step at once: what training does."""
        with closing(self.loader.steps(0, _ENDLESS)) as batches:
            for batch in batches:
                self.train(*batch.views)
                yield len(batch.samples)

    @cached_property
    def train(self) -> Callable[[Tensor, Tensor], None]:
        """The step of train.py; compiled once, where it is compiled."""
        s = self.setting
        torch.manual_seed(0)
        model.prepare_device(self.device, deterministic=False)
        compile_mode, _ = model.choose_compilation("auto", self.device)
        backbone = model.build_backbone(s.network.backbone, s.network.width, s.network.small_stem)
        widths, lambd, loss_scale = s.network.projector, s.network.lambd, s.network.loss_scale
        network = model.BarlowTwins(
            backbone, widths, lambd, loss_scale, one_pass=compile_mode is not None
        )
        network = network.to(self.device).to(memory_format=torch.channels_last)
        dtype = model.choose_precision("auto", self.device)
        forward = model.compile_and_wrap(self.device, network, compile_mode)
        groups = model.parameter_groups(network, s.optim.weight_decay)
        optimizer = model.LARS(
            groups, lr=1e-3, momentum=s.optim.momentum, eta=s.optim.eta, clip=s.optim.clip_lr
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

        def train(view_a: Tensor, view_b: Tensor) -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss = forward(view_a, view_b).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        for _ in range(_FIRST_STEPS):
            train(*self.some_views(2))
        return train


def _files(store: Store) -> Iterable[str | Path]:
    """What is opened to read the images of a store."""
    whole = store.store if isinstance(store, Subset) else store
    return whole.files if isinstance(whole, RecordStore) else map(store.name, range(len(store)))


@contextmanager
def _readers(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes_from_disk() -> int | None:
    """That this process has read so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
