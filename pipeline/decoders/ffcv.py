"""Betons through FFCV: its loader reads them, batch after batch, ahead and without Python's lock, into its memory map.

What FFCV decodes is inexact (the fast DCT), its errors go unnoticed, and its resize is another one. So an operation of
ours stands where its decoder would, which only reads; the encoded images are decoded and cropped from FFCV's memory by
the code that all decoders on the CPU share, once for all views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np

from ..formats.beton import BetonStore
from ..images import Encoded
from ..machine import torch_threads_kept
from ..order import Samples
from ..recipe import Recipe
from ..stores import Store, Subset
from .cpu import CpuDecoder
from .decoder import Boxes, Crops

with torch_threads_kept():  # importing FFCV sets them to one
    from ffcv import Loader
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.reader import Reader

_BATCHES_AHEAD = 2  # that are being read, before those that are being decoded


class FfcvDecoder(CpuDecoder):
    """See `Decoder`. ValueError for a store that is neither a beton nor a part of one, or that FFCV reads otherwise."""

    name = "ffcv"

    def __init__(self, store: Store, recipe: Recipe, threads: int, why: str = "as asked") -> None:
        super().__init__(store, recipe, threads, why)
        self.samples = np.arange(len(store), dtype=np.int64)  # in the beton
        while isinstance(store, Subset):
            self.samples, store = store.samples[self.samples], store.store
        if not isinstance(store, BetonStore):
            raise ValueError(
                "the decoder ffcv reads betons alone: make one with convert.py, or choose another decoder"
            )
        self.path, self.raw, self.bytes = (
            store.path,
            store.raw[self.samples],
            store.path.stat().st_size,
        )
        fields = Reader(str(self.path)).handlers
        image = next(
            (name for name, field in fields.items() if isinstance(field, RGBImageField)), None
        )
        pipelines = {name: [_Read()] if name == image else None for name in fields}
        # Batches may have any size, since `_Read` has no memory made for them. A seed, or NumPy's state would change.
        options = {
            "num_workers": 1,
            "os_cache": True,
            "batches_ahead": _BATCHES_AHEAD + 1,
            "seed": 0,
        }
        with torch_threads_kept():
            self.loader = Loader(str(self.path), 1, pipelines=pipelines, **options)
        # FFCV's compiled code trusts the tables that it has read: they must be those that were checked.
        table, manager = self.loader.reader.metadata, self.loader.memory_manager
        addresses = table[f"f{list(fields).index(image)}"]["data_ptr"]
        entries = np.searchsorted(manager.ptrs, addresses).clip(max=len(manager.sizes) - 1)
        same = np.array_equal(addresses, store.index["offset"])
        if not same or not np.array_equal(manager.sizes[entries], store.index["bytes"]):
            raise ValueError(
                f"{self.path} has changed, or FFCV misreads it: start anew, or choose another decoder"
            )

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        with closing(self._read(plan)) as read, closing(super().stream(read)) as crops:
            yield from crops

    def _read(
        self, plan: Iterable[tuple[Samples, Boxes]]
    ) -> Generator[tuple[Samples, Boxes], None, None]:
        """The plan, and FFCV has read the batches of it that have been given."""
        reading: deque[tuple[Samples, Boxes]] = deque()
        with closing(_Reading(self.loader)) as batches:
            for samples, boxes in plan:
                if (
                    self.path.stat().st_size != self.bytes
                ):  # what was cut off ends a process that looks for it
                    raise OSError(f"{self.path} has changed while it was being read: restore it")
                batches.todo.put(self.samples[samples])
                reading.append((samples, boxes))
                if len(reading) > _BATCHES_AHEAD:
                    next(batches)
                    yield reading.popleft()
            for step in reading:
                next(batches)
                yield step

    def _encoded(self, samples: Samples) -> Sequence[Encoded]:
        file, rows = memoryview(self.loader.memory_manager.context.mmap), self.store.index[samples]
        where = zip(rows["offset"].tolist(), rows["bytes"].tolist(), strict=True)
        images: list[Encoded] = [file[at : at + size] for at, size in where]
        for i in np.flatnonzero(self.raw[samples]):
            (images[i],) = self.store.read_batch(samples[i : i + 1])
        return images


class _Read(SimpleRGBImageDecoder):
    """Fetches the images of a batch: the disk is waited for in FFCV's thread, by compiled code."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("u8")), None

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read

        def fetch(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            seen = np.uint64(0)  # is returned, so that the compiler has to look
            for i in range(len(batch_indices)):
                image = read(metadata[batch_indices[i]]["data_ptr"], storage_state)
                for at in range(0, len(image), 4096):  # bytes, a page of memory
                    seen += np.uint64(image[at])
            return seen

        return fetch


class _Reading(EpochIterator):
    """FFCV's thread, which takes batch after batch from `todo`: by itself it wants a list of all there will be."""

    def __init__(self, loader: Loader) -> None:
        self.todo: SimpleQueue[Samples | None] = SimpleQueue()
        self.started = Event()
        self.error: BaseException = RuntimeError("FFCV's thread has ended")
        with torch_threads_kept():
            super().__init__(loader, [])
            self.started.wait()

    def start(self) -> None:  # the last of EpochIterator.__init__
        self.iter_ixes = self._batches()
        super().start()

    def _batches(self) -> Iterator[Samples]:
        self.started.set()  # by now it has set torch's threads
        while (batch := self.todo.get()) is not None:
            yield batch

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def __next__(self) -> Any:
        if (read := self.output_queue.get()) is None:
            raise self.error
        return read

    def close(self) -> None:
        self.todo.put(None)
        super().close()
        self.join()
