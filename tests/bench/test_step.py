"""`python -m bench step`: its variants, its verdict, the loss, and the command."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import loss_benchmark, record, report, rooflines, step, step_candidates
from bench.loss_benchmark import (
    AUTHORS_LOSS,
    FULL_SHAPE,
    OUR_LOSS,
    LossShape,
    loss_candidates,
    loss_memory_on_cpu,
)
from bench.record import Rates, StepResult
from bench.step_candidates import AUTHORS, step_variants
from bench.step_comparison import InterleavedBenchmark
from bench.step_report import FUSED, MEMORY, MULTIPLY, verdict
from experiment import PRESETS, Console, DataConfig, ModelConfig, OptimConfig, Pretrain

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
TINY = Pretrain(
    DataConfig(size=32), ModelConfig("resnet18", 4, projector="16-16"), OptimConfig(batch_size=8)
)

# The verdict

BOUNDS = {f"{MULTIPLY}, float32": 1000.0, f"{MEMORY}, float32": 500.0, f"{FUSED}, float32": 800.0}


def make_steps(*rates: float) -> list[StepResult]:
    """The authors' step and three of ours, at these rates."""
    names = (AUTHORS, "+ our loss and LARS", "+ channels-last", "the same, CUDA graphs")
    return [
        StepResult(name, AUTHORS, "float32", 128, Rates([rate, rate]), rate / rates[0], None)
        for name, rate in zip(names, rates, strict=True)
    ]


def make_losses() -> list[StepResult]:
    return [
        StepResult(AUTHORS_LOSS, AUTHORS_LOSS, "float32", 256, Rates([1.0]), 1, 4.0),
        StepResult(OUR_LOSS, AUTHORS_LOSS, "float32", 256, Rates([1.0]), 25, 0.2),
    ]


def test_the_verdict_names_the_limit_and_the_factors_of_the_gain() -> None:
    steps = [*make_steps(100, 110, 220, 250), *make_losses()]
    limit, known, gain, loss = verdict(steps, BOUNDS, {"alone": 2500}, 16384)
    assert limit.startswith(
        "Memory traffic is the limit in float32. Bound by memory traffic (no fusion): 500 images/s;"
    )
    assert "(the same, CUDA graphs, batch 128): 250, which is 50%, 31% and 25% of these." in limit
    assert "10% of 2,500 (alone)" in known
    factors = "1.10 (our loss and LARS) x 2.00 (channels-last) = 2.20; the same, CUDA graphs 2.50."
    assert factors in gain
    assert loss == (
        "For N 256 and D 16384 our loss takes 1/25 of the time of the authors' form "
        "and 1/20 of its memory."
    )


def test_multiplication_can_be_the_limit() -> None:
    bounds = {**BOUNDS, f"{MULTIPLY}, float32": 400.0}
    limit, _ = verdict(make_steps(100, 110, 220, 250), bounds, {}, 16384)
    assert limit.startswith("Multiplication is the limit")


def test_there_is_no_gain_if_the_authors_step_does_not_fit() -> None:
    steps = [
        StepResult(one.name, AUTHORS, "float32", 128, one.rates, None, None)
        for one in make_steps(100, 110, 220, 250)
        if one.name != AUTHORS
    ]
    assert len(verdict(steps, BOUNDS, {}, 16384)) == 1
    assert verdict([], BOUNDS, {}, 16384) == []


# The variants


@pytest.fixture
def compiling_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with bfloat16 and a compiler, as far as the choice of variants can tell."""
    choices = step_candidates.model
    monkeypatch.setattr(choices, "choose_precision", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(choices, "choose_compilation", lambda mode, device: (mode, "compiled"))


def test_variants_on_a_gpu_that_compiles(compiling_gpu: None) -> None:
    variants, _ = step_variants(CUDA, quick=False)
    assert [variant.dtype for variant in variants] == [torch.float16] * 2 + [torch.bfloat16] * 5
    assert [variant.compile_mode for variant in variants] == [
        None,
        None,
        None,
        "default",
        "default",
        "max-autotune-no-cudagraphs",
        "reduce-overhead",
    ]
    assert [variant.one_pass for variant in variants] == [False] * 4 + [True] * 3
    layouts = [torch.contiguous_format] + [torch.channels_last] * 6
    assert [variant.layout for variant in variants] == layouts


def test_variants_on_a_gpu_that_does_not_compile(
    compiling_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose_none(mode: str, device: torch.device) -> tuple[None, str]:
        return None, "not compiled, since there is no compiler"

    monkeypatch.setattr(step_candidates.model, "choose_compilation", choose_none)
    variants, reason = step_variants(CUDA, quick=False)
    assert [variant.compile_mode for variant in variants] == [None] * 3
    assert reason == "not compiled, since there is no compiler"


# The command

STEP_NAMES = [
    AUTHORS,
    "+ our loss and LARS",
    "+ channels-last",
    "+ compiled",
    "+ views in one batch",
]


@pytest.fixture
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which nothing takes long, and a compiler that does not compile."""

    def pretend_memory(form: str, shape: LossShape) -> float:
        return 1.0 if form == OUR_LOSS else 30.0

    monkeypatch.setitem(PRESETS, "demo", lambda: TINY)
    monkeypatch.setattr(loss_benchmark, "QUICK_SHAPE", LossShape(8, 64))
    monkeypatch.setattr(step, "loss_memory_on_cpu", pretend_memory)
    monkeypatch.setattr(rooflines, "_GPU_BLOCK", 1 << 20)
    monkeypatch.setattr(rooflines, "_SECONDS", 0.01)
    monkeypatch.setattr(torch._dynamo.config, "disable", True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: beside other test processes, several would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_steps_and_losses_are_measured_recorded_and_reported(
    small_measurements: None,
    one_thread: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, trace = tmp_path / "step.json", tmp_path / "trace.json.gz"
    arguments = ["--quick", "--device", "cpu", "--batch-size", "4", "8"]
    arguments += ["--json", str(path), "--trace", str(trace)]
    with Console() as console:
        assert step.main(arguments, console) == 0
    printed = capsys.readouterr().out
    result = record.read(path)
    assert result.command == (
        "python -m bench step --quick --device cpu --batch-size 4 8 "
        "--json step.json --trace trace.json.gz"
    )
    assert [(one.batch_size, one.name) for one in result.steps] == [
        *itertools.product((4, 8), STEP_NAMES),
        *itertools.product((8,), (AUTHORS_LOSS, OUR_LOSS)),
    ]
    assert all(len(one.rates.images_per_s) == 2 for one in result.steps)
    assert all(one.ratio == 1 for one in result.steps if one.name == one.against)
    assert [one.memory_gib for one in result.steps] == [None] * 10 + [30, 1]
    assert result.bounds.keys() == BOUNDS.keys()
    assert result.settings["skipped"] == []
    assert all(sentence in printed for sentence in result.verdict)
    assert trace.stat().st_size > 1000

    table = report.to_markdown(result)
    assert all(f"| {name} | 8 |" in table for name in (*STEP_NAMES, AUTHORS_LOSS, OUR_LOSS))
    assert all(sentence in table for sentence in result.verdict)
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["--turns", "0"], "--rounds is 0: it must be at least 1"),  # the option's former name
        (["--steps", "0"], "--steps is 0"),
        (["--batch-size", "8", "1"], "--batch-size is 1: it must be at least 2"),
        (["--json", "/"], "--json is /: it must be a writable path in an existing folder"),
        (
            ["--trace", "no/such/x.gz"],
            "--trace is no/such/x.gz: it must be a writable path in an existing",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step.main(arguments, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_with_a_compiler(tmp_path: Path) -> None:
    """Compiles two programs, which takes minutes."""
    command = [sys.executable, "-m", "bench", "step", "--quick", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = record.read(tmp_path / "a.json")
    last_three = [one.name for one in result.steps][-3:]
    assert last_three == ["+ views in one batch", AUTHORS_LOSS, OUR_LOSS]
    assert all(one.name in done.stdout for one in result.steps)


def test_committed_records_are_of_full_length() -> None:
    paths = list((ROOT / "bench" / "results").glob("step-*.json"))
    assert paths
    for path in paths:
        result = record.read(path)
        assert result.settings["rounds"] >= 5
        assert result.steps[0].name == AUTHORS


# The loss


def show_nothing(done: int, total: int, status: str = "") -> None: ...


@pytest.mark.slow
def test_our_loss_takes_a_tenth_of_time_and_memory() -> None:
    candidates = loss_candidates(FULL_SHAPE, CPU)
    benchmark = InterleavedBenchmark(candidates, FULL_SHAPE.n, 1, CPU)
    _, ours = benchmark.run(3, show_nothing)  # type: ignore[arg-type]
    assert ours.ratio is not None
    assert ours.ratio >= 10
    theirs_gib = loss_memory_on_cpu(AUTHORS_LOSS, FULL_SHAPE)
    assert loss_memory_on_cpu(OUR_LOSS, FULL_SHAPE) < theirs_gib / 10


def test_the_memory_of_the_loss_is_what_it_allocates() -> None:
    """At least two gradients and two normalised embeddings of 16 MiB, and no D x D matrix."""
    mib = 1024 * loss_memory_on_cpu(OUR_LOSS, LossShape(512, 8192))
    assert 4 * 16 <= mib < 256
