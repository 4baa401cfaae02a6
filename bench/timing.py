"""How throughput is measured: repeats after a warm-up, by one process or by all ranks together.

`Clock` measures an endless stream of work, such as batches from a loader. `interleave` is for
things that are compared with each other: each takes part in every round, so that other load on the
machine hits all of them alike, and ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch.distributed import Store, rendezvous  # type: ignore[attr-defined]

from experiment import ProgressBar

from .record import Rates

# Batches before the clock starts: the loader's threads fill their queues meanwhile.
_WARM_UP = 2
# Batches that may be queued on a GPU: enough to keep it busy, and few enough that little is
# outstanding when the time is up.
_MAX_QUEUED = 2

Workload = Callable[[], Generator[int, None, None]]
"""Starts a stream of work. Each item is the number of images that have been done."""

Action = Callable[[], None]


def do_nothing() -> None: ...


@dataclass(frozen=True)
class Repeats:
    """How often and how long something is measured."""

    seconds: float  # of each repeat
    count: int


class RankGroup:
    """The processes that torchrun has started, or this one alone.

    They only wait for each other and share figures. There is no process group of torch, so that
    the loss stays each rank's own.
    """

    def __init__(
        self, rank: int, world_size: int, local_world_size: int, store: Store | None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size
        self._store = store
        self._exchanges = 0

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> RankGroup:
        """The group that torchrun's environment variables describe."""
        if "RANK" not in environment:
            return cls(0, 1, 1, None)
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local_world_size, store)

    def all_gather(self, values: list[float]) -> list[list[float]]:
        """Return the values of every rank, in the order of ranks; wait for all of them."""
        if self._store is None:
            return [values]
        self._exchanges += 1
        prefix = f"bench/{self._exchanges}"
        self._store.set(f"{prefix}/{self.rank}", json.dumps(values))
        # `get` waits until that rank has set its value.
        return [json.loads(self._store.get(f"{prefix}/{rank}")) for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather([])


class Clock:
    """Measures workloads on a device.

    Args:
        device: Where the work is done; a GPU is synchronised before the time is read.
        ranks: The processes that take part.
        repeats: How often and how long each workload is measured.
        after_each: Called after each repeat, for a progress bar.
    """

    def __init__(
        self,
        device: torch.device,
        ranks: RankGroup,
        repeats: Repeats,
        after_each: Action = do_nothing,
    ) -> None:
        self.device = device
        self.ranks = ranks
        self.repeats = repeats
        self.after_each = after_each

    def measure_together(self, work: Workload, before: Action = do_nothing) -> list[Rates]:
        """The rates of every rank while all of them work.

        `before` is called ahead of each repeat and not timed.
        """
        own = self._measure(work, before, self.ranks.barrier)
        return [Rates(rates) for rates in self.ranks.all_gather(own)]

    def measure_alone(self, work: Workload, before: Action = do_nothing) -> Rates | None:
        """The rates of rank 0 while the others wait; None if there are no others."""
        if self.ranks.world_size == 1:
            return None
        own = self._measure(work, before, do_nothing) if self.ranks.rank == 0 else []
        return Rates(self.ranks.all_gather(own)[0])

    def _measure(self, work: Workload, before: Action, wait_for_others: Action) -> list[float]:
        rates = []
        for _ in range(self.repeats.count):
            before()
            with closing(work()) as stream:
                # Before the warm-up: otherwise the loader of a rank that waits for others would
                # fill its queues, and their contents would count as work done in no time.
                wait_for_others()
                rates.append(self._measure_once(stream))
            self.after_each()
        return rates

    def _measure_once(self, stream: Iterator[int]) -> float:
        for _ in range(_WARM_UP):
            next(stream)
        self._synchronize()

        began = time.perf_counter()
        images = 0
        for count in self._limit_queue(stream):
            images += count
            if time.perf_counter() - began > self.repeats.seconds:
                break
        self._synchronize()
        return images / (time.perf_counter() - began)

    def _limit_queue(self, stream: Iterator[int]) -> Iterator[int]:
        """The same items, with a GPU at most `_MAX_QUEUED` of them behind."""
        queued: deque[torch.cuda.Event] = deque()
        for count in stream:
            if self.device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
                queued.append(event)
                if len(queued) > _MAX_QUEUED:
                    queued.popleft().synchronize()
            yield count

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def interleave(
    candidates: Sequence[NamedT], rounds: int, bar: ProgressBar
) -> Iterator[tuple[int, NamedT]]:
    """Yield (round, candidate), every candidate once a round. Round 0 is the warm-up."""
    total = (rounds + 1) * len(candidates)
    done = 0
    for number in range(rounds + 1):
        for candidate in candidates:
            bar(done, total, candidate.name)
            yield number, candidate
            done += 1


def median_speedup(reference: Sequence[float], seconds: Sequence[float]) -> float:
    """The median over the rounds of the reference's time / this time, taken within each round."""
    pairs = zip(reference, seconds, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


@contextmanager
def one_core() -> Iterator[None]:
    """Within the block, this thread and those that it starts run on one core.

    It is the last core that this process may use.
    """
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
