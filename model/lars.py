"""LARS (You et al. 2017) as the paper uses it: layer-wise rates for weights, plain momentum SGD for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, and one-dimensional parameters (biases, batch norm), which have neither weight decay nor adaptation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": weight_decay,
            "adapt": True,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


class LARS(Optimizer):
    """For each parameter p with gradient g:

        g += weight_decay * p
        g *= eta * |p| / |g|        where the group adapts, and neither norm is 0
        mu = momentum * mu + g
        p -= lr * mu

    clip: the factor is min(eta |p| / |g| / lr, 1) instead, so that no step is longer than lr |g| (solo-learn's runs).

    A step whose gradients are not all finite changes nothing. The device decides that by itself: `skipped` is 1.0 after
    such a step, else 0.0, and `skipped_steps` counts them, all of them and those in a row (tensors there; on any number
    of ranks the same, as the gradients are).

    A few launches for each group: the last two lines are torch's fused SGD, the rest are its operations on lists.
    """

    _step_supports_amp_scaling = (
        True  # a GradScaler leaves dividing by its scale, and skipping, to `step`
    )

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eta": eta,
            "clip": clip,
            "weight_decay": 0.0,
            "adapt": True,
        }
        super().__init__(groups, defaults)
        first = self.param_groups[0]["params"][0]
        self.skipped = torch.zeros((), device=first.device)
        self.skipped_steps = torch.zeros(2, device=first.device)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Momenta and counts. Weight decay, momentum and the like stay as they are here: they are the run's."""
        saved = zip(self.param_groups, state_dict["param_groups"], strict=True)
        groups = [{**mine, "params": theirs["params"]} for mine, theirs in saved]
        super().load_state_dict(state_dict | {"param_groups": groups})
        self.skipped_steps.copy_(state_dict["skipped_steps"])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [_laid_out_as(p, p.grad) for p in params]
        if (
            scale := getattr(self, "grad_scale", None)
        ) is not None:  # set by a GradScaler for the length of a step
            grads = list(torch._foreach_mul(grads, scale.reciprocal()))
        self.skipped = 1 - torch.stack(torch._foreach_norm(grads)).isfinite().all().float()
        self.skipped_steps += self.skipped
        self.skipped_steps[1] *= self.skipped
        grad_of = dict(zip(params, grads, strict=True))
        for group in self.param_groups:
            if mine := [p for p in group["params"] if p in grad_of]:
                self._step(group, mine, [grad_of[p] for p in mine])

    def _step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["weight_decay"] or group["adapt"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))  # a copy
        if group["adapt"]:
            clip_lr = group["lr"] if group["clip"] else None
            torch._foreach_mul_(grads, _layer_rates(params, grads, group["eta"], clip_lr))
        for p in params:
            mu = self.state[p].get("mu")
            self.state[p]["mu"] = torch.zeros_like(p) if mu is None else _laid_out_as(p, mu)
        sgd(
            params,
            grads,
            [self.state[p]["mu"] for p in params],
            fused=True,
            found_inf=self.skipped,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    """x in the strides of p: torch's fused SGD takes them for equal on a CPU, and insists on it on a GPU."""
    if x.stride() == p.stride():
        return x
    lies_alike = all(
        n == 1 or a == b for n, a, b in zip(p.shape, p.stride(), x.stride(), strict=True)
    )
    return x.as_strided(p.shape, p.stride()) if lies_alike else torch.empty_like(p).copy_(x)


def _layer_rates(
    params: list[Tensor], grads: list[Tensor], eta: float, clip_lr: float | None
) -> list[Tensor]:
    """eta * |p| / |g|, or min(that / clip_lr, 1); and 1 where either norm is 0."""
    p_norms, g_norms = (
        torch.stack(torch._foreach_norm(params)),
        torch.stack(torch._foreach_norm(grads)),
    )
    usable = (p_norms > 0) & (g_norms > 0)
    rates = eta * p_norms / g_norms
    if clip_lr is not None:
        rates = (rates / clip_lr).clamp(max=1)
    return list(torch.where(usable, rates, 1.0).unbind())
