"""The decoder `ffcv`: FFCV reads a beton batch by batch, ahead of time and without the GIL.

FFCV's own decoding is inexact (the fast DCT), misses errors, and resizes differently. So an
operation of ours, which only reads, takes the place of its decoder. The images are then decoded and
cropped from FFCV's memory map by the code that all decoders on the CPU share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
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

with torch_threads_kept():  # importing FFCV sets torch's number of threads to 1
    from ffcv import Loader
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.reader import Reader

_BATCHES_AHEAD = 2  # batches that are being read, besides those that are being decoded


class FfcvDecoder(CpuDecoder):
    """See `Decoder`.

    Raises:
        ValueError: If the store is neither a beton nor a subset of one, or if FFCV reads another
            table from the file than the store did.
    """

    name = "ffcv"

    def __init__(
        self, store: Store, recipe: Recipe, threads: int, reason: str = "as requested"
    ) -> None:
        super().__init__(store, recipe, threads, reason)
        beton, self.beton_samples = _find_beton(store)
        self.path = beton.path
        self.file_size = beton.path.stat().st_size
        self.is_raw = beton.is_raw[self.beton_samples]  # stored as pixels, not as a JPEG

        fields = Reader(str(self.path)).handlers
        image_field = next(
            (name for name, field in fields.items() if isinstance(field, RGBImageField)), None
        )
        self.loader = _open_loader(self.path, list(fields), image_field)
        image_number = list(fields).index(image_field)
        if not _reads_the_same_table(self.loader, f"f{image_number}", beton):
            raise ValueError(
                f"{self.path}: FFCV and twinfeed find the images at different positions. If the "
                "file has just changed, start again; otherwise use --decoder cpu"
            )

    def stream(self, plan: Iterable[tuple[Samples, Boxes]]) -> Generator[Crops, None, None]:
        with closing(self._read(plan)) as read, closing(super().stream(read)) as crops:
            yield from crops

    def _read(
        self, plan: Iterable[tuple[Samples, Boxes]]
    ) -> Generator[tuple[Samples, Boxes], None, None]:
        """The batches of the plan, each after FFCV has read it."""
        reading: deque[tuple[Samples, Boxes]] = deque()
        with closing(_ReadingThread(self.loader)) as batches:
            for samples, boxes in plan:
                # Reading a memory map beyond the end of a truncated file kills the process.
                if self.path.stat().st_size != self.file_size:
                    raise OSError(f"{self.path} has changed while it was being read: restore it")
                batches.todo.put(self.beton_samples[samples])
                reading.append((samples, boxes))
                if len(reading) > _BATCHES_AHEAD:
                    next(batches)
                    yield reading.popleft()
            for batch in reading:
                next(batches)
                yield batch

    def _read_encoded(self, samples: Samples) -> Sequence[Encoded]:
        file = memoryview(self.loader.memory_manager.context.mmap)
        rows = self.store.index[samples]
        places = zip(rows["offset"].tolist(), rows["bytes"].tolist(), strict=True)
        images: list[Encoded] = [file[offset : offset + size] for offset, size in places]
        for i in np.flatnonzero(self.is_raw[samples]):
            (images[i],) = self.store.read_batch(samples[i : i + 1])
        return images


def _find_beton(store: Store) -> tuple[BetonStore, Samples]:
    """The beton that a store is or is a subset of, and where in it the store's samples are."""
    samples = np.arange(len(store), dtype=np.int64)
    while isinstance(store, Subset):
        samples = store.samples[samples]
        store = store.store
    if not isinstance(store, BetonStore):
        raise ValueError(
            "the decoder ffcv reads only .beton files: create one with convert.py, "
            "or use --decoder cpu"
        )
    return store, samples


def _open_loader(path: Path, fields: list[str], image_field: str | None) -> Loader:
    """FFCV's loader, set up to read only the images."""
    with torch_threads_kept():
        return Loader(
            str(path),
            batch_size=1,  # batches may have any size, because `_ReadOnly` allocates nothing
            num_workers=1,
            os_cache=True,
            batches_ahead=_BATCHES_AHEAD + 1,
            seed=0,  # without one, it would change the state of NumPy's random numbers
            pipelines={name: [_ReadOnly()] if name == image_field else None for name in fields},
        )


def _reads_the_same_table(loader: Loader, image_column: str, beton: BetonStore) -> bool:
    """Whether FFCV has read the offsets and sizes that were checked when the store was opened.

    FFCV's compiled code trusts them.
    """
    manager = loader.memory_manager
    offsets = loader.reader.metadata[image_column]["data_ptr"]
    if not np.array_equal(offsets, beton.index["offset"]):
        return False
    entries = np.searchsorted(manager.ptrs, offsets).clip(max=len(manager.sizes) - 1)
    return np.array_equal(manager.sizes[entries], beton.index["bytes"])


class _ReadOnly(SimpleRGBImageDecoder):
    """Reads the images of a batch, so that FFCV's thread waits for the disk in compiled code."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("u8")), None

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read

        def fetch(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            checksum = np.uint64(0)  # returned, so that the compiler cannot leave out the reads
            for i in range(len(batch_indices)):
                image = read(metadata[batch_indices[i]]["data_ptr"], storage_state)
                for at in range(0, len(image), 4096):  # bytes: one of each page of memory
                    checksum += np.uint64(image[at])
            return checksum

        return fetch


class _ReadingThread(EpochIterator):
    """FFCV's thread, which reads the batches that are put into `todo`.

    FFCV itself needs a list of all batches beforehand.
    """

    def __init__(self, loader: Loader) -> None:
        self.todo: SimpleQueue[Samples | None] = SimpleQueue()
        self.started = Event()
        self.error: BaseException = RuntimeError("FFCV's thread has ended")
        with torch_threads_kept():
            super().__init__(loader, [])
            self.started.wait()

    def start(self) -> None:  # called at the end of EpochIterator.__init__
        self.iter_ixes = self._batches()
        super().start()

    def _batches(self) -> Iterator[Samples]:
        self.started.set()  # by now the thread has set torch's number of threads
        while (batch := self.todo.get()) is not None:
            yield batch

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def __next__(self) -> Any:
        result = self.output_queue.get()
        if result is None:
            raise self.error
        return result

    def close(self) -> None:
        self.todo.put(None)
        super().close()
        self.join()
