"""Rates of work, over repeats, on all ranks together."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import torch
from torch.distributed import Store, rendezvous  # type: ignore[attr-defined]

from .record import Rates

_WARM_UP = 2  # batches: what is made ahead is then being made
_AHEAD = 2  # batches that may be queued on a GPU: it stays busy, and is not far behind when the time is up

Work = Callable[[], Generator[int, None, None]]  # each item: so many images have been done
Act = Callable[[], None]


def nothing() -> None: ...


class RankGroup:
    """The processes that torchrun has started, or this one alone. They only wait for each other and share figures."""

    def __init__(self, rank: int, world: int, local_world: int, store: Store | None) -> None:
        self.rank, self.world, self.local_world, self._store = rank, world, local_world, store
        self._meetings = 0

    @classmethod
    def started(cls, environment: dict[str, str]) -> RankGroup:
        """As the environment says. A store of keys is enough: with no process group, the loss stays each rank's own."""
        if "RANK" not in environment:
            return cls(0, 1, 1, None)
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        return cls(rank, world, int(environment.get("LOCAL_WORLD_SIZE", world)), store)

    def share(self, value: list[float]) -> list[list[float]]:
        """Every rank's value, in the order of ranks; all of them wait for the last one."""
        if self._store is None:
            return [value]
        self._meetings += 1
        prefix = f"bench/{self._meetings}"
        self._store.set(f"{prefix}/{self.rank}", json.dumps(value))
        return [
            json.loads(self._store.get(f"{prefix}/{rank}")) for rank in range(self.world)
        ]  # waits for each

    def meet(self) -> None:
        self.share([])


class Clock:
    """Measures work on a device: `repeats` times, each for about `seconds`, after a warm-up.

    `after_each` is called after each repeat, for a progress bar.
    """

    def __init__(
        self,
        device: torch.device,
        ranks: RankGroup,
        seconds: float,
        repeats: int,
        after_each: Act = nothing,
    ) -> None:
        self.device, self.ranks, self.seconds, self.repeats = device, ranks, seconds, repeats
        self.after_each = after_each

    def together(self, work: Work, before: Act = nothing) -> list[Rates]:
        """Of every rank, while all of them work at once. `before` is done ahead of each repeat and not timed."""
        mine = self._rates(work, before, self.ranks.meet)
        return [Rates(rates) for rates in self.ranks.share(mine)]

    def alone(self, work: Work, before: Act = nothing) -> Rates | None:
        """Of the first rank while the others wait; None where there are no others."""
        if self.ranks.world == 1:
            return None
        mine = self._rates(work, before, nothing) if self.ranks.rank == 0 else []
        return Rates(self.ranks.share(mine)[0])

    def _rates(self, work: Work, before: Act, start: Act) -> list[float]:
        found = []
        for _ in range(self.repeats):
            before()
            with closing(work()) as turns:
                start()  # ahead of the warm-up: while a rank waits for others, its loader would fill up for nothing
                for _ in range(_WARM_UP):
                    next(turns)
                self._settle()
                began, images = time.perf_counter(), 0
                for count in self._paced(turns):
                    images += count
                    if time.perf_counter() - began > self.seconds:
                        break
                self._settle()
                found.append(images / (time.perf_counter() - began))
            self.after_each()
        return found

    def _paced(self, turns: Iterator[int]) -> Iterator[int]:
        """The turns, of which a GPU is at most `_AHEAD` behind."""
        queued: deque[torch.cuda.Event] = deque()
        for count in turns:
            if self.device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
                queued.append(event)
                if len(queued) > _AHEAD:
                    queued.popleft().synchronize()
            yield count

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def one_core() -> Iterator[None]:
    """Within the block this thread, and what it starts, runs on the last core that it may use."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
