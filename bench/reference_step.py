"""The authors' training step, written anew from its facts: what ours is measured beside.

Channels-first and eager; one view after the other; the cross-correlation as a D x D matrix; LARS one parameter at a
time. Network and update are those of `model`, but for the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import model
from experiment.config import ModelConfig


class Network(nn.Module):
    """From two views [N, 3, S, S] to the loss. Its parameters have the names that `BarlowTwins` gives them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        backbone = model.build_backbone(config.backbone, config.width, config.small_stem)
        ours = model.BarlowTwins(backbone, config.projector, config.lambd)
        with_torchs_batch_norm(ours)
        self.backbone, self.projector, self.lambd = ours.backbone, ours.projector, config.lambd
        self.bn = nn.BatchNorm1d(int(config.projector.rpartition("-")[2]), affine=False)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        z_a, z_b = (self.projector(self.backbone(view)) for view in (view_a, view_b))  # [N, D] each
        return loss(self.bn(z_a), self.bn(z_b), self.lambd)


def with_torchs_batch_norm(module: nn.Module) -> None:
    """Puts torch's own layers in the place of ours, which are subclasses of them."""
    for name, child in module.named_children():
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            if isinstance(child, kind):
                setattr(module, name, kind(child.num_features))
        with_torchs_batch_norm(child)


def loss(a: Tensor, b: Tensor, lambd: float) -> Tensor:
    """Of normalised embeddings [N, D], by way of the matrix and each of its elements."""
    n, d = a.shape
    c = (a.T @ b).div_(n)  # [D, D]
    on_diagonal = (c.diagonal() - 1).square().sum()
    # Behind its first element, the matrix is D - 1 rows of D + 1, each with an element of the diagonal at its end.
    off_diagonal = c.flatten()[1:].view(d - 1, d + 1)[:, :-1].square().sum()
    return on_diagonal + lambd * off_diagonal


class LARS(Optimizer):
    """One parameter after the other, in single operations. Takes the groups of `model.parameter_groups`."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, eta: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if group["adapt"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, update_norm = p.norm(), update.norm()
                    one = torch.ones_like(p_norm)
                    rate = torch.where(update_norm > 0, group["eta"] * p_norm / update_norm, one)
                    update = update.mul(torch.where(p_norm > 0, rate, one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])
