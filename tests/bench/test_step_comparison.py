"""Interleaved candidates: their rates and ratios, and what happens if memory runs out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench import step_comparison
from bench.record import StepResult
from bench.step_comparison import Candidate, InterleavedBenchmark, RunStep

CPU = torch.device("cpu")


def do_nothing() -> None: ...


def show_nothing(done: int, total: int, status: str = "") -> None: ...


def candidate(name: str, run_step: RunStep = do_nothing) -> Candidate:
    return Candidate(name, torch.float32, lambda: run_step)


def run(benchmark: InterleavedBenchmark, rounds: int) -> list[StepResult]:
    return benchmark.run(rounds, show_nothing)  # type: ignore[arg-type]


def test_the_ratio_is_the_median_of_ratios_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1.0, 0.5, 2.0, 4.0, 3.0, 1.0])  # theirs, ours, theirs, ours, ...
    monkeypatch.setattr(step_comparison, "seconds_per_step", lambda *arguments: next(taken))
    benchmark = InterleavedBenchmark([candidate("theirs"), candidate("ours")], 8, 1, CPU)
    theirs, ours = run(benchmark, rounds=3)
    assert theirs.ratio == 1
    assert ours.ratio == 2  # of 2, 0.5 and 3
    assert theirs.rates.images_per_s == [8, 4, 8 / 3]
    assert ours.rates.images_per_s == [16, 2, 8]
    assert ours.ms == 1000 * 8 / 8
    assert ours.against == "theirs"


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_candidates_that_do_not_fit_are_skipped_and_the_others_measured() -> None:
    calls = itertools.count()

    def fail_at_fourth_call() -> None:
        if next(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    candidates = [
        candidate("first", run_out_of_memory),
        candidate("second", fail_at_fourth_call),
        candidate("third"),
    ]
    benchmark = InterleavedBenchmark(candidates, 8, 2, CPU)
    (result,) = run(benchmark, rounds=2)
    assert benchmark.skipped == [
        "first, batch 8: out of memory",
        "second, batch 8: out of memory",
    ]
    assert result.name == "third"
    assert result.ratio is None  # the first, which it is compared with, was not measured
    assert len(result.rates.images_per_s) == 2


def test_any_other_error_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run(InterleavedBenchmark([candidate("broken", fail)], 8, 1, CPU), rounds=1)


def test_the_last_change_is_profiled(tmp_path: Path) -> None:
    calls: list[str] = []
    candidates = [
        candidate(name, lambda name=name: calls.append(name)) for name in ("a", "+ b", "+ c", "d")
    ]
    benchmark = InterleavedBenchmark(candidates, 8, 1, CPU)
    run(benchmark, rounds=1)
    calls.clear()
    benchmark.write_profile(tmp_path / "trace.json")
    assert set(calls) == {"+ c"}
    assert (tmp_path / "trace.json").stat().st_size > 0
