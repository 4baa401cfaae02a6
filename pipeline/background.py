"""`BackgroundIterator`: makes the items of an iterator ahead of time, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class _End(NamedTuple):
    """Marks the end of the items, with the error that ended them, if any."""

    error: BaseException | None


class BackgroundIterator(Generic[Item]):
    """Iterates over `items`, which run in a thread, up to `ahead` items before they are used.

    Errors in the thread are raised in the thread that iterates. `close` must be called at the end:
    it closes `items` and waits for the thread.
    """

    def __init__(self, items: Generator[Item, None, None], ahead: int) -> None:
        self._items = items
        self._ready: queue.Queue[Item | _End] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="twinfeed-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> BackgroundIterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._take()
        if not isinstance(item, _End):
            return item
        if item.error is None:
            raise StopIteration
        if isinstance(item.error, Exception):
            raise item.error
        # A SystemExit raised by some library must not end the run silently.
        raise RuntimeError(f"a thread of the loader ended with {item.error!r}") from item.error

    def close(self) -> None:
        """End the thread, and wait until it has ended."""
        self._closed.set()
        self._thread.join()

    def _take(self) -> Item | _End:
        while True:
            try:
                return self._ready.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return _End(RuntimeError("the thread that makes the batches is gone"))

    def _produce(self) -> None:
        try:
            with closing(self._items) as items:
                for item in items:
                    self._put(item)
                    if self._closed.is_set():
                        return
            self._put(_End(None))
        except BaseException as error:
            self._put(_End(error))

    def _put(self, item: Item | _End) -> None:
        """Wait for room in the queue, but not after `close`."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
