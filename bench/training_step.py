"""One training step, as `train.py` takes it: forward, backward, update, with mixed precision.

`stages.py` measures it behind the loader, `step_candidates.py` in several variants beside the
authors' step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import model
from experiment import ModelConfig, OptimConfig

LEARNING_RATE = 1e-3
# The usual 65536 overflows at first, and a step that is skipped costs less than a whole one.
_INITIAL_LOSS_SCALE = 256.0


@dataclass(frozen=True)
class StepVariant:
    """How a step is computed.

    A name that begins with "+" is a change to the variant before it.
    """

    name: str
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    compile_mode: str | None = None
    one_pass: bool = False


class TrainingStep:
    """A step on two views [B, 3, S, S]; `forward` takes them and returns the loss."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._forward = forward
        self._optimizer = optimizer
        self._device_type = device.type
        self._dtype = dtype
        self._autocast = dtype in (torch.float16, torch.bfloat16)
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=_INITIAL_LOSS_SCALE, enabled=dtype == torch.float16
        )

    def __call__(self, view_a: Tensor, view_b: Tensor) -> None:
        self._optimizer.zero_grad()
        with torch.autocast(self._device_type, self._dtype, enabled=self._autocast):
            loss = self._forward(view_a, view_b)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()


def build_step(
    config: ModelConfig, optim: OptimConfig, variant: StepVariant, device: torch.device
) -> TrainingStep:
    """The step of `train.py` on a network with random weights, the same for every variant."""
    torch.manual_seed(0)
    network = model.build_network(config, one_pass=variant.one_pass)
    network = network.to(device).to(memory_format=variant.layout)
    wrapped = model.compile_and_wrap(device, network, variant.compile_mode)
    optimizer = model.LARS(
        model.parameter_groups(network, optim.weight_decay),
        lr=LEARNING_RATE,
        momentum=optim.momentum,
        eta=optim.eta,
        clip=optim.clip_lr,
    )

    def forward(view_a: Tensor, view_b: Tensor) -> Tensor:
        return wrapped(view_a, view_b).loss

    return TrainingStep(forward, optimizer, device, variant.dtype)
