"""The network of the paper: one backbone and projector for both views, and the loss of their embeddings."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .loss import LossParts, barlow_loss, normalize


class BarlowTwins(nn.Module):
    """Backbone and projector. `forward` takes two views [B, 3, S, S] and returns the loss with its parts.

    projector: widths of its linear layers, "8192-8192-8192" in the paper; batch norm and ReLU between them.
    lambd: weight of the off-diagonal terms. loss_scale multiplies the loss, which matters only to what LARS leaves
    alone (see docs/method.md).
    """

    def __init__(self, backbone: Backbone, projector: str, lambd: float, loss_scale: float = 1.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = build_projector(backbone.out_features, projector)
        self.lambd, self.loss_scale = lambd, loss_scale

    def embed(self, view: Tensor) -> Tensor:
        """Normalised embeddings [B, D] of one view [B, 3, S, S], by the statistics of this view's batch alone."""
        z = self.projector(self.backbone(view))
        with torch.autocast(z.device.type, enabled=False):  # squares underflow in half precision
            return normalize(z.to(torch.promote_types(z.dtype, torch.float32)))

    def forward(self, view_a: Tensor, view_b: Tensor) -> LossParts:
        a, b = self.embed(view_a), self.embed(view_b)
        with torch.autocast(a.device.type, enabled=False):
            parts = barlow_loss(a, b, self.lambd)
        return parts._replace(loss=parts.loss * self.loss_scale)


def build_projector(in_features: int, widths: str) -> nn.Sequential:
    """Linear layers of the given widths ("8192-8192-8192"), without bias; batch norm and ReLU between them."""
    try:
        sizes = [in_features, *(int(width) for width in widths.split("-"))]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"projector is {widths!r}: give the widths of its layers, like 8192-8192-8192")
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
