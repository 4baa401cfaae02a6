"""LARS (You et al. 2017) as Barlow Twins uses it.

Weights get layer-wise learning rates; biases and batch norm get SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two groups for `LARS`.

    The first group has the weights. The second has the one-dimensional parameters (biases and batch
    norm), with neither weight decay nor adaptation.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1]
    biases = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": biases, "weight_decay": 0.0, "adapt": False},
    ]


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling. For each parameter p with gradient g::

        g += weight_decay * p
        g *= eta * |p| / |g|        if the group adapts, and neither norm is 0
        mu = momentum * mu + g
        p -= lr * mu

    A step is skipped, and changes nothing, if a gradient is not finite. The device decides that
    without waiting for the host, and all ranks decide the same because their gradients are equal.

    It takes a few kernel launches per group: torch's operations on lists of tensors, and its fused
    SGD for the last two lines.

    Args:
        groups: Parameter groups, as `parameter_groups` makes them.
        lr: Learning rate. Set `group["lr"]` before each step to follow a schedule.
        momentum: Factor on the momentum mu.
        eta: Trust coefficient of the adaptation.
        clip: Replace the factor on g by min(eta * |p| / |g| / lr, 1), so that no step is longer
            than lr * |g|. solo-learn's published runs use this.

    Attributes:
        skipped: 1.0 if the last step was skipped, else 0.0 (a tensor on the device).
        skipped_steps: The number of skipped steps, [2]: all of them, and those in a row up to now.
    """

    # A GradScaler then leaves it to `step` to divide by the scale and to skip.
    _step_supports_amp_scaling = True

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
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros(2, device=device)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the momenta and the counts of skipped steps.

        Weight decay, momentum and the other hyper-parameters stay those of this optimizer.
        """
        groups = [
            {**group, "params": saved_group["params"]}
            for group, saved_group in zip(
                self.param_groups, state_dict["param_groups"], strict=True
            )
        ]
        super().load_state_dict(state_dict | {"param_groups": groups})
        self.skipped_steps.copy_(state_dict["skipped_steps"])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [_match_strides(p.grad, p) for p in params]
        scale = getattr(self, "grad_scale", None)  # a GradScaler sets it during a step
        if scale is not None:
            grads = list(torch._foreach_mul(grads, scale.reciprocal()))

        all_finite = torch.stack(torch._foreach_norm(grads)).isfinite().all()
        self.skipped = 1 - all_finite.float()
        self.skipped_steps += self.skipped
        self.skipped_steps[1] *= self.skipped

        grad_of = dict(zip(params, grads, strict=True))
        for group in self.param_groups:
            group_params = [p for p in group["params"] if p in grad_of]
            if group_params:
                self._update_group(group, group_params, [grad_of[p] for p in group_params])

    def _update_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> None:
        if group["weight_decay"] or group["adapt"]:
            # Out of place, since p.grad belongs to the caller.
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            clip_lr = group["lr"] if group["clip"] else None
            torch._foreach_mul_(grads, _layer_rates(params, grads, group["eta"], clip_lr))

        sgd(
            params,
            grads,
            [self._momentum_of(p) for p in params],
            fused=True,
            found_inf=self.skipped,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _momentum_of(self, p: Tensor) -> Tensor:
        """The momentum buffer of p, which is created here, with the strides of p."""
        state = self.state[p]
        if "mu" in state:
            state["mu"] = _match_strides(state["mu"], p)
        else:
            state["mu"] = torch.zeros_like(p)
        return state["mu"]


def _match_strides(x: Tensor, p: Tensor) -> Tensor:
    """x with the strides of p, which has the same shape; a copy only if the layouts differ.

    torch's fused SGD assumes equal strides on a CPU, and requires them on a GPU.
    """
    if x.stride() == p.stride():
        return x
    # The stride of a dimension of size 1 does not matter.
    same_layout = all(
        size == 1 or p_stride == x_stride
        for size, p_stride, x_stride in zip(p.shape, p.stride(), x.stride(), strict=True)
    )
    if same_layout:
        return x.as_strided(p.shape, p.stride())
    return torch.empty_like(p).copy_(x)


def _layer_rates(
    params: list[Tensor], grads: list[Tensor], eta: float, clip_lr: float | None
) -> list[Tensor]:
    """The factor on each gradient: eta * |p| / |g|, and 1 if either norm is 0.

    clip_lr: the learning rate, if the factor is min(eta * |p| / |g| / lr, 1) instead.
    """
    p_norms = torch.stack(torch._foreach_norm(params))
    g_norms = torch.stack(torch._foreach_norm(grads))
    rates = eta * p_norms / g_norms
    if clip_lr is not None:
        rates = (rates / clip_lr).clamp(max=1)
    usable = (p_norms > 0) & (g_norms > 0)
    return list(torch.where(usable, rates, 1.0).unbind())
