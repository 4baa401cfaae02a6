"""Networks and views with random values, for the tests of model/."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def randomize(network: Module, seed: int = 0) -> Module:
    """Set each floating-point entry of the state to a random value, also zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        assert value.numel(), name
        if not value.is_floating_point():
            continue
        uniform = torch.rand(value.shape, generator=generator, dtype=value.dtype)
        if value.ndim < 2:
            value.copy_(0.5 + uniform)
        else:
            fan_in = value[0].numel()
            value.copy_((uniform - 0.5) / math.sqrt(fan_in))
    return network


def make_views(
    batch: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Two random views [batch, 3, size, size] with different means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, batch, 3, size, size, generator=generator, dtype=dtype)
    return a, 2 * b + 1
