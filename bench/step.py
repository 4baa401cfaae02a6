"""`python -m bench step`: the training step alone, on resident random views; the authors' and ours, in turns.

Between the two stand the changes that make one of the other, so that the table says what each of them gains. And the
two forms of the loss beside each other, at a size where the matrix of the authors' form takes a gibibyte.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import model
import pipeline
from experiment import Console
from experiment.config import ModelConfig, Pretrain
from experiment.presets import PRESETS

from . import record, reference_step, rooflines, tables
from .interleaved import Entrant, Work, contest, growth, precision
from .record import Step

AUTHORS, MATRIX, GRAM = "the authors' step", "authors' loss, D x D", "our loss, N x N"
MULTIPLY, MEMORY, FUSED = "multiplications", "memory traffic", "memory traffic without ReLUs"
LOSS, QUICK_LOSS = (256, 16384), (64, 4096)  # N, D
_LR, _LAMBD = 1e-3, 0.0051

# Two-view images/s that a GPU's memory allows the paper's network at 224 px, in half precision and channels-last.
KNOWN_ARE = ("operation by operation", "batch norm and ReLU as one", "both within the convolutions")
KNOWN = {"H200": (4050, 4950, 8600), "A100": (1820, 2210, 4000)}


@dataclass(frozen=True)
class Options:
    """Measures the training step on resident random views, the authors' beside ours, and the two forms of the loss."""

    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    """Whose network is trained, at its size of views [default: demo on a CPU, imagenet-1000e on a GPU]."""
    batch_size: tuple[int, ...] = ()
    """Images a step, one number or several [default: 128 on a CPU, 256 512 1024 2048 on a GPU]."""
    turns: int = 7
    """Each way is measured so often, after each other."""
    steps: int = 10
    """Steps of a turn."""
    quick: bool = False
    """Two turns of two steps, the default compilation alone, a smaller loss."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """File for the record of this run."""
    trace: Path | None = None
    """File for torch's profile of our step, such as trace.json.gz, which chrome://tracing and Perfetto tables."""

    def check(self) -> None:
        """ValueError for what cannot be measured."""
        counts = [("--turns", self.turns, 1), ("--steps", self.steps, 1)]
        for option, value, least in [*counts, *(("--batch-size", b, 2) for b in self.batch_size)]:
            if value < least:
                raise ValueError(f"{option} is {value}: it must be at least {least}")
        for option, path in {"--json": self.json, "--trace": self.trace}.items():
            if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
                raise ValueError(
                    f"{option} {path} cannot be written: name a file in a folder that is there"
                )


class Way(NamedTuple):
    """How our step is taken. A name that begins with + is a change to the way before."""

    name: str
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    compile_mode: str | None = None
    one_pass: bool = False


def main(arguments: list[str], console: Console) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m bench step")
    options.check()
    device = pipeline.find_device(options.device)
    gpu = device.type == "cuda"
    name = options.preset or ("imagenet-1000e" if gpu else "demo")
    preset: Pretrain = PRESETS[name]()
    size, (n, d) = preset.data.size, QUICK_LOSS if options.quick else LOSS
    batch_sizes = options.batch_size or (
        (256, 512, 1024, 2048) if gpu else (min(128, preset.optim.batch_size),)
    )
    turns, steps = (2, 2) if options.quick else (options.turns, options.steps)
    model.prepare_device(device, deterministic=False)
    ways, why = our_ways(device, options.quick)
    console.print(f"{pipeline.describe_device(device)}, preset {name}; ours {why}")

    found: list[Step] = []
    skipped: list[str] = []
    for batch_size in batch_sizes:
        with console.progress(f"steps of {batch_size}") as bar:
            entrants = step_entrants(preset, ways, batch_size, device)
            found += contest(
                entrants, batch_size, turns, steps, device, bar, skipped, options.trace
            )
    with console.progress("the loss") as bar:
        entrants = [
            Entrant(form, torch.float32, partial(loss_work, form, n, d, device))
            for form in (MATRIX, GRAM)
        ]
        losses = contest(entrants, n, min(turns, 3), steps if gpu else 1, device, bar, skipped)
        if not gpu:
            losses = [
                dataclasses.replace(step, memory_gib=memory_of_loss(step.name, n, d))
                for step in losses
            ]
    with console.progress("the ceilings"):
        bounds = ceilings_of(preset.model, size, {way.dtype for way in ways}, device)
    machine = record.machine(device)
    known = known_limits(preset.model, size, machine.gpu)
    result = record.Record(
        command=record.command(["step", *arguments]),
        commit=record.commit(),
        versions=record.versions(("torch", "torchvision")),
        machine=machine,
        data=record.Data("random two-view images", max(batch_sizes), 24 * size**2, size, size),
        settings={
            "preset": name,
            "network": f"{preset.model.backbone} of width {preset.model.width}, projector {preset.model.projector}",
            "turns": turns,
            "steps": steps,
            "loss": {"n": n, "d": d},
            "skipped": skipped,
        },
        rungs=[],
        contenders=[],
        bounds=bounds | known,
        verdict=verdict([*found, *losses], bounds, known, d),
        steps=[*found, *losses],
    )
    tables.steps(result, console)
    if options.json:
        result.write(options.json)
        console.print(f"written to {options.json}")
    return 0


def our_ways(device: torch.device, quick: bool) -> tuple[list[Way], str]:
    """From a step that is the authors' but for loss and LARS to the one that train.py takes where it compiles."""
    gpu = device.type == "cuda"
    best = model.choose_precision("auto", device)
    way = Way("+ our loss and LARS", torch.float16 if gpu else best)
    ways = [way, way := way._replace(name="+ channels-last", layout=torch.channels_last)]
    if way.dtype != best:
        ways.append(way := way._replace(name=f"+ {precision(best)}", dtype=best))
    mode, why = model.choose_compilation("default", device)
    if mode is None:
        return ways, why
    ways.append(way := way._replace(name="+ compiled", compile_mode=mode))
    ways.append(way := way._replace(name="+ both in one pass", one_pass=True))
    if gpu and not quick:
        ways.append(
            way._replace(name="the same, tuned kernels", compile_mode="max-autotune-no-cudagraphs")
        )
        ways.append(way._replace(name="the same, CUDA graphs", compile_mode="reduce-overhead"))
    if (
        not gpu and not quick and "bf16" in Path("/proc/cpuinfo").read_text()
    ):  # elsewhere it is emulated, and slow
        ways.append(way._replace(name="the same, bfloat16", dtype=torch.bfloat16))
    return ways, why


def step_entrants(
    preset: Pretrain, ways: Sequence[Way], batch_size: int, device: torch.device
) -> list[Entrant]:
    """The authors' step, then ours."""
    torch.compiler.reset()  # or it would make one program for several batch sizes
    m, o = preset.model, preset.optim
    shape = (batch_size, 3, preset.data.size, preset.data.size)
    plain = [torch.randn(shape, device=device) for _ in range(2)]
    views = {
        layout: [view.contiguous(memory_format=layout) for view in plain]
        for layout in {w.layout for w in ways}
    }

    def theirs() -> Work:
        torch.manual_seed(0)
        network = reference_step.Network(m).to(device)
        optimizer = reference_step.LARS(
            model.parameter_groups(network, o.weight_decay), _LR, o.momentum, o.eta
        )
        return training(network, optimizer, plain, ways[0].dtype)

    def ours(way: Way) -> Work:
        torch.manual_seed(0)
        backbone = model.build_backbone(m.backbone, m.width, m.small_stem)
        network = model.BarlowTwins(
            backbone, m.projector, m.lambd, m.loss_scale, one_pass=way.one_pass
        )
        network = network.to(device).to(memory_format=way.layout)
        forward = model.compile_and_wrap(device, network, way.compile_mode)
        optimizer = model.LARS(
            model.parameter_groups(network, o.weight_decay), _LR, o.momentum, o.eta, o.clip_lr
        )
        return training(lambda *pair: forward(*pair).loss, optimizer, views[way.layout], way.dtype)

    return [
        Entrant(AUTHORS, ways[0].dtype, theirs),
        *(Entrant(w.name, w.dtype, partial(ours, w)) for w in ways),
    ]


def training(
    forward: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    dtype: torch.dtype,
) -> Work:
    """What train.py does with a batch; `forward` takes the views and returns the loss."""
    device = views[0].device.type
    # Its usual 65536 overflows at first, and a step that is skipped costs less.
    scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=dtype == torch.float16)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            loss = forward(*views)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def loss_work(form: str, n: int, d: int, device: torch.device) -> Work:
    """From embeddings [N, D] of two views to the gradients of the loss by them."""
    z = [torch.randn(n, d, device=device, requires_grad=True) for _ in range(2)]

    def work() -> None:
        for x in z:
            x.grad = None
        if form == MATRIX:
            a, b = (F.batch_norm(x, None, None, training=True) for x in z)
            reference_step.loss(a, b, _LAMBD).backward()
        else:
            a, b = map(model.normalize, z)
            model.barlow_loss(a, b, _LAMBD, form="nxn").loss.backward()

    return work


def memory_of_loss(form: str, n: int, d: int) -> float:
    """GiB that the loss and its gradients take on a CPU, measured in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        return apart.submit(_growth, form, n, d).result()


def _growth(form: str, n: int, d: int) -> float:
    cpu = torch.device("cpu")
    loss_work(form, 64, 256, cpu)()  # threads and libraries are there afterwards
    return growth(loss_work(form, n, d, cpu))


def ceilings_of(
    network: ModelConfig, size: int, dtypes: set[torch.dtype], device: torch.device
) -> dict[str, float]:
    """Images/s if a step were nothing but its multiplications, or nothing but its memory traffic; by precision."""
    found, speed = {}, rooflines.memory_speed(device)
    for dtype in sorted(dtypes, key=str):
        found[f"{MULTIPLY}, {precision(dtype)}"] = rooflines.arithmetic(
            network, size, device, dtype
        )
        for what, fused in ((MEMORY, False), (FUSED, True)):
            found[f"{what}, {precision(dtype)}"] = speed / rooflines.step_traffic(
                network, size, dtype, fused
            )
    return found


def known_limits(network: ModelConfig, size: int, gpu: str | None) -> dict[str, float]:
    """What is known of this GPU and network, by what it is; nothing of most."""
    if size != 224 or dataclasses.replace(network, lambd=0.0, loss_scale=1.0) != ModelConfig(
        lambd=0.0
    ):
        return {}
    found = [limits for name, limits in KNOWN.items() if name in (gpu or "")]
    return dict(zip(KNOWN_ARE, found[0], strict=True)) if found else {}


def verdict(
    steps: Sequence[Step], bounds: Mapping[str, float], known: Mapping[str, float], d: int
) -> list[str]:
    """What binds, what the gain is made of, and what the loss of D dimensions costs in the authors' form."""
    return [*_binding(steps, bounds, known), *_gain(steps), *_of_loss(steps, d)]


def _binding(
    steps: Sequence[Step], bounds: Mapping[str, float], known: Mapping[str, float]
) -> Iterator[str]:
    ours = [step for step in steps if step.against == AUTHORS and step.name != AUTHORS]
    if not ours:
        return
    best = max(ours, key=lambda step: step.rates.median)
    rate = best.rates.median
    multiply, memory, fused = (
        bounds[f"{what}, {best.precision}"] for what in (MULTIPLY, MEMORY, FUSED)
    )
    yield (
        f"{'Memory traffic' if memory < multiply else 'Multiplication'} binds: in {best.precision} this machine's "
        f"memory allows {tables.number(memory)} images/s operation by operation and {tables.number(fused)} with ReLUs done "
        f"on the way, its multiplications {tables.number(multiply)}. The fastest step ({best.name.removeprefix('+ ')}, "
        f"batch {best.batch_size}) makes {tables.number(rate)}: {rate / memory:.0%}, {rate / fused:.0%} and "
        f"{rate / multiply:.0%} of these."
    )
    if known:
        fractions = (
            f"{rate / limit:.0%} of {limit:,.0f} ({what})" for what, limit in known.items()
        )
        yield f"Of what this GPU is known to allow it reaches {', '.join(fractions)}."


def _gain(steps: Sequence[Step]) -> Iterator[str]:
    """What each change multiplies the rate by, for each batch size."""
    found = [(s, s.ratio) for s in steps if s.against == AUTHORS and s.ratio is not None]
    for batch_size in dict.fromkeys(step.batch_size for step, _ in found):
        here = [(step.name, ratio) for step, ratio in found if step.batch_size == batch_size]
        changes = [(name, ratio) for name, ratio in here if name == AUTHORS or name.startswith("+")]
        factors = [
            f"{now / before:.2f} ({name[2:]})" for (_, before), (name, now) in pairwise(changes)
        ]
        rest = "".join(
            f"; {name} {ratio:.2f}" for name, ratio in here if (name, ratio) not in changes
        )
        if factors:
            product = f"{' x '.join(factors)} = {changes[-1][1]:.2f}"
            yield f"At batch {batch_size} the gain over the authors' step is {product}{rest}."


def _of_loss(steps: Sequence[Step], d: int) -> Iterator[str]:
    forms = {step.name: step for step in steps if step.against == MATRIX}
    if len(forms) == 2:
        theirs, ours = forms[MATRIX], forms[GRAM]
        yield (
            f"For N {ours.batch_size} and D {d} our loss takes 1/{ours.ratio:.0f} of the time of the authors' form and "
            f"1/{(theirs.memory_gib or 0) / (ours.memory_gib or 1):.0f} of its memory."
        )
