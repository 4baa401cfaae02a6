"""The clock, the ranks, and rounds of candidates that are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.timing import (
    Clock,
    RankGroup,
    Repeats,
    Workload,
    interleave,
    median_speedup,
    one_core,
)
from tests.helpers.processes import free_port

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ALONE = RankGroup(0, 1, 1, None)


def sleeping(seconds: float, images: int = 5, warm_up: float = 0.0) -> Workload:
    def work() -> Generator[int, None, None]:
        for step in range(1000):
            time.sleep(warm_up if step < 2 else seconds)
            yield images

    return work


def test_preparation_and_warm_up_are_not_timed() -> None:
    calls: list[int] = []

    def before() -> None:
        calls.append(1)
        time.sleep(0.3)

    clock = Clock(CPU, ALONE, Repeats(0.1, 3))
    (rates,) = clock.measure_together(sleeping(0.01, warm_up=0.2), before)
    assert len(rates.images_per_s) == len(calls) == 3
    assert 150 < rates.median <= 500  # 60 if they were timed


def test_each_repeat_opens_and_closes_the_work() -> None:
    events: list[str] = []

    def work() -> Generator[int, None, None]:
        events.append("open")
        try:
            while True:
                time.sleep(0.001)
                yield 1
        finally:
            events.append("closed")

    clock = Clock(CPU, ALONE, Repeats(0.01, 3), after_each=lambda: events.append("done"))
    clock.measure_together(work)
    assert events == ["open", "closed", "done"] * 3


def test_work_that_ends_early_is_counted_in_full() -> None:
    def work() -> Generator[int, None, None]:
        yield from (0, 0)
        time.sleep(0.05)
        yield 10

    (rates,) = Clock(CPU, ALONE, Repeats(60.0, 2)).measure_together(work)
    assert 20 < rates.median <= 200


def test_there_is_no_rate_alone_without_other_ranks() -> None:
    assert Clock(CPU, ALONE, Repeats(0.01, 1)).measure_alone(sleeping(0.01)) is None


def test_one_core_restores_cores_and_threads() -> None:
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    with one_core():
        assert os.sched_getaffinity(0) == {max(cores)}
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads


class Named(NamedTuple):
    name: str


def test_every_candidate_takes_part_in_every_round_after_a_warm_up() -> None:
    progress: list[tuple[int, int, str]] = []

    def bar(done: int, total: int, status: str) -> None:
        progress.append((done, total, status))

    rounds = interleave([Named("a"), Named("b")], 2, bar)  # type: ignore[arg-type]
    order = [(number, candidate.name) for number, candidate in rounds]
    assert order == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert progress == [(done, 6, name) for done, (_, name) in enumerate(order)]


def test_the_speedup_is_the_median_of_ratios_within_rounds() -> None:
    # Ratios 2, 0.5 and 3. The ratio of the means would be 6 / 5.5.
    assert median_speedup([1.0, 2.0, 3.0], [0.5, 4.0, 1.0]) == 2


def test_two_processes_exchange_figures_and_wait_for_each_other() -> None:
    code = """
import json, os, time
from bench.timing import RankGroup
ranks = RankGroup.from_environment(dict(os.environ))
time.sleep(1.0 * ranks.rank)
first = ranks.all_gather([ranks.rank, 0.5])
met = time.time()
ranks.barrier()
print(json.dumps([first, ranks.all_gather([10.0 * ranks.rank]), met]))
ranks.barrier()
"""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    for first, second, _ in printed:
        assert first == [[0, 0.5], [1, 0.5]]
        assert second == [[0.0], [10.0]]
    met_at = [met for _, _, met in printed]
    assert abs(met_at[0] - met_at[1]) < 0.9  # one of them was a second late


def test_without_torchrun_a_process_is_alone() -> None:
    group = RankGroup.from_environment({})
    assert (group.rank, group.world_size, group.local_world_size) == (0, 1, 1)
    assert group.all_gather([1.0]) == [[1.0]]
