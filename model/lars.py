"""LARS (You et al. 2017) as the paper uses it: layer-wise rates for weights, plain momentum SGD for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, and one-dimensional parameters (biases, batch norm), which have neither weight decay nor adaptation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


class LARS(Optimizer):
    """For each parameter p with gradient g:

        g += weight_decay * p
        g *= eta * |p| / |g|        where the group adapts, and neither norm is 0
        mu = momentum * mu + g
        p -= lr * mu

    clip: the factor is min(eta |p| / |g| / lr, 1) instead, so that no step is longer than lr |g| (solo-learn's runs).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "eta": eta, "clip": clip, "weight_decay": 0.0, "adapt": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                clip_lr = group["lr"] if group["clip"] else None
                torch._foreach_mul_(grads, _layer_rates(params, grads, group["eta"], clip_lr))
            for p in params:
                if p not in self.state or "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            momenta = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _layer_rates(params: list[Tensor], grads: tuple[Tensor, ...], eta: float, clip_lr: float | None) -> list[Tensor]:
    """eta * |p| / |g|, or min(that / clip_lr, 1); and 1 where either norm is 0."""
    p_norms, g_norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
    usable = (p_norms > 0) & (g_norms > 0)
    rates = eta * p_norms / g_norms
    if clip_lr is not None:
        rates = (rates / clip_lr).clamp(max=1)
    return list(torch.where(usable, rates, 1.0).unbind())
