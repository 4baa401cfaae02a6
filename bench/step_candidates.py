"""The training steps that `python -m bench step` compares: the authors', and ours by changes.

Between the authors' step and the one that `train.py` takes stand variants that each add one change
(channels-last, bfloat16, compilation, ...), so that the table shows what each change gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import model
from experiment import Pretrain

from . import reference_step
from .step_comparison import Candidate, RunStep, precision_name
from .training_step import LEARNING_RATE, StepVariant, TrainingStep, build_step

AUTHORS = "the authors' step"


def step_variants(device: torch.device, quick: bool) -> tuple[list[StepVariant], str]:
    """Our variants, in order, and why they are compiled or not.

    The first is the authors' step with our loss and LARS, and the last with a "+" is the step that
    `train.py` takes if it compiles the network.
    """
    on_gpu = device.type == "cuda"
    best_precision = model.choose_precision("auto", device)
    first_precision = torch.float16 if on_gpu else best_precision
    variant = StepVariant("+ our loss and LARS", first_precision)
    variants = [variant]

    variant = replace(variant, name="+ channels-last", layout=torch.channels_last)
    variants.append(variant)
    if best_precision != first_precision:
        name = f"+ {precision_name(best_precision)}"
        variant = replace(variant, name=name, dtype=best_precision)
        variants.append(variant)

    compile_mode, reason = model.choose_compilation("default", device)
    if compile_mode is None:
        return variants, reason
    variant = replace(variant, name="+ compiled", compile_mode=compile_mode)
    variants.append(variant)
    variant = replace(variant, name="+ views in one batch", one_pass=True)
    variants.append(variant)
    if not quick:
        variants += _alternatives(variant, on_gpu)
    return variants, reason


def _alternatives(best: StepVariant, on_gpu: bool) -> list[StepVariant]:
    """Variants of the last step that `train.py` offers as options."""
    if on_gpu:
        tuned = replace(
            best, name="the same, max-autotune", compile_mode="max-autotune-no-cudagraphs"
        )
        graphs = replace(best, name="the same, CUDA graphs", compile_mode="reduce-overhead")
        return [tuned, graphs]
    # CPUs without these instructions emulate bfloat16, which is slow.
    if "bf16" in Path("/proc/cpuinfo").read_text():
        return [replace(best, name="the same, bfloat16", dtype=torch.bfloat16)]
    return []


@dataclass(frozen=True)
class StepBuilder:
    """Builds steps of one network on the same random views."""

    preset: Pretrain
    device: torch.device
    views: dict[torch.memory_format, list[Tensor]]  # two, [B, 3, S, S] each

    def build_reference(self, dtype: torch.dtype) -> RunStep:
        """The authors' step."""
        torch.manual_seed(0)
        optim = self.preset.optim
        network = reference_step.Network(self.preset.model).to(self.device)
        groups = model.parameter_groups(network, optim.weight_decay)
        optimizer = reference_step.LARS(groups, LEARNING_RATE, optim.momentum, optim.eta)
        step = TrainingStep(network, optimizer, self.device, dtype)
        return partial(step, *self.views[torch.contiguous_format])

    def build_ours(self, variant: StepVariant) -> RunStep:
        """One of our variants."""
        step = build_step(self.preset.model, self.preset.optim, variant, self.device)
        return partial(step, *self.views[variant.layout])


def step_candidates(
    preset: Pretrain, variants: Sequence[StepVariant], batch_size: int, device: torch.device
) -> list[Candidate]:
    """The authors' step, then our variants."""
    # Otherwise the compiler would make one program for several batch sizes.
    torch.compiler.reset()
    shape = (batch_size, 3, preset.data.size, preset.data.size)
    contiguous = [torch.randn(shape, device=device) for _ in range(2)]
    views = {torch.contiguous_format: contiguous}
    for layout in {variant.layout for variant in variants}:
        views[layout] = [view.contiguous(memory_format=layout) for view in contiguous]

    builder = StepBuilder(preset, device, views)
    first_precision = variants[0].dtype
    reference = Candidate(
        AUTHORS, first_precision, partial(builder.build_reference, first_precision)
    )
    ours = [
        Candidate(variant.name, variant.dtype, partial(builder.build_ours, variant))
        for variant in variants
    ]
    return [reference, *ours]
