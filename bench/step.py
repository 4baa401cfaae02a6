"""`python -m bench step`: the throughput of the training step alone, on random views.

The authors' step is measured beside ours, with every change between them as a step of its own
(`step_candidates.py`), and the two forms of the loss beside each other (`loss_benchmark.py`).

Two rooflines bound a step: its multiplications at the speed of one large matrix product, and its
memory traffic at the speed of one large copy (`rooflines.py`, `step_cost.py`). The traffic is
counted twice, with ReLUs as operations of their own and with ReLUs fused into the operation before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import model
import pipeline
from experiment import DEFAULT_IN_HELP, PRESETS, Console, ModelConfig, Pretrain

from . import loss_benchmark, record, rooflines, tables
from .loss_benchmark import LossShape, loss_candidates, loss_memory_on_cpu
from .options import check_at_least, check_writable
from .record import Data, Record, StepResult
from .step_candidates import step_candidates, step_variants
from .step_comparison import InterleavedBenchmark, precision_name
from .step_cost import step_traffic
from .step_report import FUSED, MEMORY, MULTIPLY, verdict
from .training_step import StepVariant

# Two-view images/s that a GPU's memory allows for the paper's network at 224 px, in half precision
# and channels-last: the traffic of the step, counted operation by operation, divided by the
# bandwidth of a large copy on that GPU (4.3 TB/s measured on an H200).
KNOWN_DESCRIPTIONS = (
    "operation by operation",
    "batch norm and ReLU fused",
    "batch norm and ReLU fused into the convolutions",
)
KNOWN = {"H200": (4050, 4950, 8600), "A100": (1820, 2210, 4000)}
_KNOWN_SIZE = 224

_MOST_LOSS_ROUNDS = 3  # the D x D form takes seconds on a CPU


@dataclass(frozen=True)
class StepOptions:
    """Measures training on random views: compares our training step and loss with the authors'."""

    preset: Annotated[Literal[tuple(PRESETS)] | None, DEFAULT_IN_HELP] = None  # type: ignore[valid-type]
    """Preset that defines the network and the size of its views [default: demo on a CPU,
    imagenet-1000e on a GPU]."""
    batch_size: Annotated[tuple[int, ...], DEFAULT_IN_HELP] = ()
    """Images per step, one number or several [default: 128 on a CPU, 256 512 1024 2048 on a
    GPU]."""
    rounds: Annotated[int, tyro.conf.arg(aliases=["--turns"])] = 7
    """Number of rounds; each round measures every variant once."""
    steps: int = 10
    """Steps per round."""
    quick: bool = False
    """Two rounds of two steps; only torch.compile's default mode; the loss is measured with
    smaller N and D."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Write the results to this JSON file."""
    trace: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """File for torch's profile of our step, such as trace.json.gz, for chrome://tracing or
    Perfetto."""

    def check(self) -> None:
        """Raise ValueError for options that nothing can be measured with."""
        check_at_least("--rounds", self.rounds, 1)
        check_at_least("--steps", self.steps, 1)
        for batch_size in self.batch_size:
            check_at_least("--batch-size", batch_size, 2)  # batch statistics need two images
        check_writable("--json", self.json)
        check_writable("--trace", self.trace)


@dataclass(frozen=True)
class StepPlan:
    """What is measured, with every default filled in."""

    preset_name: str
    preset: Pretrain
    device: torch.device
    batch_sizes: tuple[int, ...]
    rounds: int
    steps: int
    loss_shape: LossShape
    trace: Path | None


@dataclass(frozen=True)
class Measured:
    """The results, and a line for each candidate that ran out of memory."""

    steps: list[StepResult]
    skipped: list[str]


def main(arguments: list[str], console: Console) -> int:
    """Measure, print the record, and write it if asked to."""
    options = tyro.cli(StepOptions, args=arguments, prog="python -m bench step")
    options.check()
    plan = make_plan(options)
    model.prepare_device(plan.device, deterministic=False)
    variants, reason = step_variants(plan.device, options.quick)
    device_name = pipeline.describe_device(plan.device)
    console.print(f"{device_name}, preset {plan.preset_name}; our step is {reason}")

    measured = measure(plan, variants, console)
    with console.progress_bar("the rooflines"):
        dtypes = {variant.dtype for variant in variants}
        bounds = step_rooflines(plan.preset.model, plan.preset.data.size, dtypes, plan.device)
    result = make_record(plan, measured, bounds, arguments)
    tables.print_steps(result, console)
    if options.json:
        result.write(options.json)
        console.print(f"written to {options.json}")
    return 0


def make_plan(options: StepOptions) -> StepPlan:
    """Fill in the defaults, which depend on the device."""
    device = pipeline.find_device(options.device)
    on_gpu = device.type == "cuda"
    preset_name = options.preset or ("imagenet-1000e" if on_gpu else "demo")
    preset: Pretrain = PRESETS[preset_name]()
    batch_sizes = options.batch_size
    if not batch_sizes and on_gpu:
        batch_sizes = (256, 512, 1024, 2048)
    elif not batch_sizes:
        batch_sizes = (min(128, preset.optim.batch_size),)
    return StepPlan(
        preset_name=preset_name,
        preset=preset,
        device=device,
        batch_sizes=batch_sizes,
        rounds=2 if options.quick else options.rounds,
        steps=2 if options.quick else options.steps,
        loss_shape=loss_benchmark.QUICK_SHAPE if options.quick else loss_benchmark.FULL_SHAPE,
        trace=options.trace,
    )


def measure(plan: StepPlan, variants: Sequence[StepVariant], console: Console) -> Measured:
    """Measure the steps at every batch size, and the loss."""
    steps: list[StepResult] = []
    skipped: list[str] = []
    for batch_size in plan.batch_sizes:
        of_batch = measure_steps(plan, variants, batch_size, console)
        steps += of_batch.steps
        skipped += of_batch.skipped
    loss = measure_loss(plan, console)
    return Measured([*steps, *loss.steps], [*skipped, *loss.skipped])


def measure_steps(
    plan: StepPlan, variants: Sequence[StepVariant], batch_size: int, console: Console
) -> Measured:
    """Measure the authors' step and ours at one batch size."""
    candidates = step_candidates(plan.preset, variants, batch_size, plan.device)
    benchmark = InterleavedBenchmark(candidates, batch_size, plan.steps, plan.device)
    with console.progress_bar(f"steps of {batch_size}") as bar:
        steps = benchmark.run(plan.rounds, bar)
        if plan.trace:
            benchmark.write_profile(plan.trace)
    return Measured(steps, benchmark.skipped)


def measure_loss(plan: StepPlan, console: Console) -> Measured:
    """Measure the two forms of the loss."""
    shape = plan.loss_shape
    on_gpu = plan.device.type == "cuda"
    steps = plan.steps if on_gpu else 1
    rounds = min(plan.rounds, _MOST_LOSS_ROUNDS)
    candidates = loss_candidates(shape, plan.device)
    benchmark = InterleavedBenchmark(candidates, shape.n, steps, plan.device)
    with console.progress_bar("the loss") as bar:
        losses = benchmark.run(rounds, bar)
        if not on_gpu:
            losses = [
                dataclasses.replace(loss, memory_gib=loss_memory_on_cpu(loss.name, shape))
                for loss in losses
            ]
    return Measured(losses, benchmark.skipped)


def step_rooflines(
    network: ModelConfig, size: int, dtypes: set[torch.dtype], device: torch.device
) -> dict[str, float]:
    """Images/s of a step that only multiplies, or only moves memory, by name and precision."""
    bandwidth = rooflines.memory_bandwidth(device)
    bounds = {}
    for dtype in sorted(dtypes, key=str):
        precision = precision_name(dtype)
        multiply_rate = rooflines.multiply_rate(network, size, device, dtype)
        bounds[f"{MULTIPLY}, {precision}"] = multiply_rate
        traffic = step_traffic(network, size, dtype)
        bounds[f"{MEMORY}, {precision}"] = bandwidth / traffic
        fused_traffic = step_traffic(network, size, dtype, fused=True)
        bounds[f"{FUSED}, {precision}"] = bandwidth / fused_traffic
    return bounds


def known_rooflines(network: ModelConfig, size: int, gpu: str | None) -> dict[str, float]:
    """The rooflines that are known for this GPU and network; empty for most."""
    # The weight and the scale of the loss do not change the cost of a step.
    architecture = dataclasses.replace(network, lambd=0.0, loss_scale=1.0)
    is_papers_network = architecture == ModelConfig(lambd=0.0)
    if size != _KNOWN_SIZE or not is_papers_network:
        return {}
    for name, rates in KNOWN.items():
        if name in (gpu or ""):
            return dict(zip(KNOWN_DESCRIPTIONS, rates, strict=True))
    return {}


def make_record(
    plan: StepPlan, measured: Measured, bounds: dict[str, float], arguments: Sequence[str]
) -> Record:
    """The record of a run."""
    size = plan.preset.data.size
    machine = record.machine(plan.device)
    known = known_rooflines(plan.preset.model, size, machine.gpu)
    return Record(
        command=record.command(["step", *arguments]),
        commit=record.commit(),
        versions=record.versions(("torch", "torchvision")),
        machine=machine,
        data=Data(
            name="random two-view images",
            images=max(plan.batch_sizes),
            mean_bytes=24 * size**2,  # two views of three float32 channels
            mean_width=size,
            mean_height=size,
        ),
        settings={
            "preset": plan.preset_name,
            "network": record.describe_network(plan.preset.model),
            "rounds": plan.rounds,
            "steps": plan.steps,
            "loss": plan.loss_shape._asdict(),
            "skipped": measured.skipped,
        },
        steps=measured.steps,
        bounds={**bounds, **known},
        verdict=verdict(measured.steps, bounds, known, plan.loss_shape.d),
    )
