"""Steps of work in turns with each other: how long each takes, and how much memory."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from experiment import ProgressBar

from .record import Rates, Step

_WARM_UP = 3  # steps: memory is found, kernels are chosen and compiled, CUDA graphs are recorded
_TRACED = 3  # steps

Work = Callable[[], object]


class Entrant(NamedTuple):
    """Something to be measured: `start` makes ready what then does one step. With a +, it changes the one before."""

    name: str
    dtype: torch.dtype
    start: Callable[[], Work]


def contest(
    entrants: Sequence[Entrant],
    batch_size: int,
    turns: int,
    steps: int,
    device: torch.device,
    bar: ProgressBar,
    skipped: list[str],
    trace: Path | None = None,
) -> list[Step]:
    """Every entrant turn by turn, compared with the first. What the memory is too small for joins `skipped`.

    trace: file for a profile of the last of those whose name begins with +.
    """
    running: dict[str, tuple[Work, float | None]] = {}
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for turn in range(turns + 1):  # the first makes them ready
        for i, entrant in enumerate(entrants):
            bar(turn * len(entrants) + i, (turns + 1) * len(entrants), entrant.name)
            try:
                if turn == 0:
                    running[entrant.name] = _started(entrant, min(_WARM_UP, steps), device)
                elif entrant.name in running:
                    seconds[entrant.name].append(_seconds(running[entrant.name][0], steps, device))
                continue
            except (RuntimeError, MemoryError) as error:
                if not (
                    isinstance(error, MemoryError)
                    or re.search("out of memory|allocate memory", str(error))
                ):
                    raise
            running.pop(entrant.name, None)
            skipped.append(f"{entrant.name}, batch {batch_size}: out of memory")
            gc.collect()  # behind the handler, which holds what it has caught
            torch.cuda.empty_cache()
    ours = [
        entrant.name
        for entrant in entrants
        if entrant.name in running and entrant.name.startswith("+")
    ]
    if trace and ours:
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if device.type == "cuda" else []),
        ]
        with profile(activities=activities) as profiled:
            for _ in range(_TRACED):
                running[ours[-1]][0]()
        profiled.export_chrome_trace(str(trace))
    found, first = [], entrants[0].name
    for name, dtype, _ in entrants:
        if name in running:
            pairs = zip(seconds[first], seconds[name], strict=True) if first in running else ()
            ratios = [theirs / ours for theirs, ours in pairs]
            rates = Rates([batch_size / s for s in seconds[name]])
            ratio = statistics.median(ratios) if ratios else None
            found.append(
                Step(name, first, precision(dtype), batch_size, rates, ratio, running[name][1])
            )
    return found


def _started(entrant: Entrant, warm_up: int, device: torch.device) -> tuple[Work, float | None]:
    """What does a step, warmed up; and the GiB that it and its step allocate on a GPU."""
    gpu = device.type == "cuda"
    gc.collect()  # what is still there of others must not go while this one is measured
    before = torch.cuda.memory_allocated(device) if gpu else 0
    work = entrant.start()
    for _ in range(warm_up):
        work()
    if not gpu:
        return work, None
    torch.cuda.reset_peak_memory_stats(device)  # kernels that were only tried may have taken more
    work()
    return work, (torch.cuda.max_memory_allocated(device) - before) / 2**30


def _seconds(work: Work, steps: int, device: torch.device) -> float:
    """That a step takes."""
    if steps > 1:
        work()  # what ran before has left its own data in the caches
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(steps):
            work()
        return (time.perf_counter() - began) / steps
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(steps):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / steps


def growth(work: Work) -> float:
    """GiB by which this process grows at most while it does a step.

    For a fresh process: what an old one has freed, it takes up again without growing. The system's figure has in it
    what libraries allocate, of which torch's own accounts know nothing.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the maximum begins anew
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 2**20


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def precision(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
