"""The training step of the authors' published code, reimplemented: the baseline of the comparison.

Channels-first and eager, one view after the other, the cross-correlation as a D x D matrix, LARS
one parameter at a time. Network and update compute the same as those of `model`, except for the
order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import model
from experiment import ModelConfig


class Network(nn.Module):
    """From two views [N, 3, S, S] to the loss. Parameters are named as in `model.BarlowTwins`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        twins = model.build_network(config)
        replace_batch_norm(twins)
        self.backbone = twins.backbone
        self.projector = twins.projector
        self.lambd = config.lambd
        embedding_width = int(config.projector.rpartition("-")[2])
        self.bn = nn.BatchNorm1d(embedding_width, affine=False)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        z_a = self.projector(self.backbone(view_a))  # [N, D]
        z_b = self.projector(self.backbone(view_b))
        return loss(self.bn(z_a), self.bn(z_b), self.lambd)


def replace_batch_norm(module: nn.Module) -> None:
    """Replace `model`'s batch norm layers with the layers of torch that they derive from."""
    for name, child in module.named_children():
        for layer_type in (nn.BatchNorm1d, nn.BatchNorm2d):
            if isinstance(child, layer_type):
                setattr(module, name, layer_type(child.num_features))
        replace_batch_norm(child)


def loss(a: Tensor, b: Tensor, lambd: float) -> Tensor:
    """The loss of normalised embeddings [N, D], from every element of the D x D matrix."""
    n, d = a.shape
    c = (a.T @ b).div_(n)  # [D, D]
    on_diagonal = (c.diagonal() - 1).square().sum()
    # Without its first element, the matrix is D - 1 rows of D + 1 elements, and the last element of
    # each row is on the diagonal.
    off_diagonal = c.flatten()[1:].view(d - 1, d + 1)[:, :-1].square().sum()
    return on_diagonal + lambd * off_diagonal


class LARS(Optimizer):
    """LARS in single operations, one parameter at a time, for `model.parameter_groups`."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, eta: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if group["adapt"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm = p.norm()
                    update_norm = update.norm()
                    one = torch.ones_like(p_norm)
                    rate = torch.where(update_norm > 0, group["eta"] * p_norm / update_norm, one)
                    update = update.mul(torch.where(p_norm > 0, rate, one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])
