"""Training steps that are compared with each other: their time, their memory, and a profile.

Every candidate takes part in every round, and its ratio to the first candidate is taken within the
round, so that other load on the machine cancels out.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import model
from experiment import ProgressBar

from .record import Rates, StepResult
from .timing import interleave, median_speedup

# Steps before the first round: memory is allocated, kernels are chosen and compiled, CUDA graphs
# are recorded.
_WARM_UP = 3
_PROFILED = 3  # steps

RunStep = Callable[[], object]


class Candidate(NamedTuple):
    """Something to measure.

    `prepare` builds it and returns a function that takes one step. A name that begins with "+" is
    a change to the candidate before it.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable[[], RunStep]


class InterleavedBenchmark:
    """Measures candidates round by round and compares them with the first.

    A candidate that runs out of memory is dropped, and `skipped` has a line about it.

    Args:
        candidates: What to measure.
        batch_size: Images per step.
        steps: Steps per round.
        device: Where the steps run.
    """

    def __init__(
        self, candidates: Sequence[Candidate], batch_size: int, steps: int, device: torch.device
    ) -> None:
        self.skipped: list[str] = []
        self._candidates = candidates
        self._batch_size = batch_size
        self._steps = steps
        self._device = device
        self._running: dict[str, RunStep] = {}
        self._memory_gib: dict[str, float | None] = {}
        self._seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}

    def run(self, rounds: int, bar: ProgressBar) -> list[StepResult]:
        """Measure all candidates."""
        for number, candidate in interleave(self._candidates, rounds, bar):
            ran_out_of_memory = False
            try:
                if number == 0:
                    self._prepare(candidate)
                elif candidate.name in self._running:
                    seconds = self._measure(self._running[candidate.name])
                    self._seconds[candidate.name].append(seconds)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                ran_out_of_memory = True
            if ran_out_of_memory:  # outside the handler, which keeps what the error refers to alive
                self._drop(candidate)
        return self._results()

    def write_profile(self, path: Path) -> None:
        """Write a profile by torch of the last candidate with a "+", if there is one.

        chrome://tracing and Perfetto show such a file.
        """
        changes = [name for name in self._running if name.startswith("+")]
        if not changes:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        run_step = self._running[changes[-1]]
        with profile(activities=activities) as profiled:
            for _ in range(_PROFILED):
                run_step()
        profiled.export_chrome_trace(str(path))

    def _prepare(self, candidate: Candidate) -> None:
        """Build a candidate, warm it up, and measure the memory that it allocates on a GPU."""
        on_gpu = self._device.type == "cuda"
        gc.collect()  # memory of other candidates must not be freed during the measurement
        before = torch.cuda.memory_allocated(self._device) if on_gpu else 0
        run_step = candidate.prepare()
        for _ in range(min(_WARM_UP, self._steps)):
            run_step()
        memory_gib = None
        if on_gpu:
            # Kernels that were only tried may have taken more.
            torch.cuda.reset_peak_memory_stats(self._device)
            run_step()
            peak = torch.cuda.max_memory_allocated(self._device)
            memory_gib = (peak - before) / 2**30
        self._running[candidate.name] = run_step
        self._memory_gib[candidate.name] = memory_gib

    def _measure(self, run_step: RunStep) -> float:
        return seconds_per_step(run_step, self._steps, self._device)

    def _drop(self, candidate: Candidate) -> None:
        self._running.pop(candidate.name, None)
        self.skipped.append(f"{candidate.name}, batch {self._batch_size}: out of memory")
        gc.collect()
        torch.cuda.empty_cache()

    def _results(self) -> list[StepResult]:
        return [self._result(one) for one in self._candidates if one.name in self._running]

    def _result(self, candidate: Candidate) -> StepResult:
        first = self._candidates[0].name
        seconds = self._seconds[candidate.name]
        ratio = None
        if first in self._running:
            ratio = median_speedup(self._seconds[first], seconds)
        return StepResult(
            name=candidate.name,
            against=first,
            precision=precision_name(candidate.dtype),
            batch_size=self._batch_size,
            rates=Rates.from_seconds(self._batch_size, seconds),
            ratio=ratio,
            memory_gib=self._memory_gib[candidate.name],
        )


def seconds_per_step(run_step: RunStep, steps: int, device: torch.device) -> float:
    """The mean time of a step over `steps` of them."""
    if steps > 1:
        run_step()  # the caches still hold the data of the candidate before
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(steps):
            run_step()
        return (time.perf_counter() - began) / steps

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        run_step()
    end.record()
    end.synchronize()
    milliseconds = start.elapsed_time(end)
    return milliseconds / 1000 / steps


def memory_growth(run_step: RunStep) -> float:
    """The GiB by which this process grows at most while it takes a step.

    Use it in a new process: an old one reuses what it has freed without growing. The figure is that
    of the system, since torch does not account for what libraries allocate.
    """
    model.reset_peak_resident()
    before = model.resident_bytes()
    run_step()
    return (model.peak_resident_bytes() - before) / 2**30


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return re.search("out of memory|allocate memory", str(error)) is not None


def precision_name(dtype: torch.dtype) -> str:
    """The name of a type as in PyTorch, without its module."""
    return str(dtype).removeprefix("torch.")
