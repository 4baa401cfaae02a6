"""The network of the paper: one backbone and projector for both views, and the loss of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .backbone import Backbone, build_backbone
from .batch_norm import BatchNorm1d, BatchNorm2d
from .loss import LossParts, barlow_loss, normalize


class NetworkConfig(Protocol):
    """The settings that `build_network` reads; `experiment.presets.ModelConfig` has them."""

    @property
    def backbone(self) -> str:
        """A name in `BACKBONES`."""

    @property
    def width(self) -> int:
        """Channels of the first stage of the backbone, 64 in the published networks."""

    @property
    def small_stem(self) -> bool:
        """Whether the backbone starts with a stem for 32-pixel images."""

    @property
    def projector(self) -> str:
        """Widths of the projector's linear layers, "8192-8192-8192" in the paper."""

    @property
    def lambd(self) -> float:
        """Weight of the redundancy term."""

    @property
    def loss_scale(self) -> float:
        """Factor on the loss."""


class BarlowTwinsOutput(NamedTuple):
    """What the network makes of two views: the loss, and what it comes from, detached."""

    parts: LossParts
    features: Tensor  # of view a, [B, F]
    a: Tensor  # the normalised embeddings, [B, D]
    b: Tensor

    @property
    def loss(self) -> Tensor:
        return self.parts.loss


class BarlowTwins(nn.Module):
    """Backbone and projector. `forward` takes two views [B, 3, S, S] and returns the loss and where it comes from.

    projector: widths of its linear layers, "8192-8192-8192" in the paper; batch norm and ReLU between them.
    lambd: weight of the off-diagonal terms. loss_scale multiplies the loss, which matters only to what LARS leaves
    alone (see docs/method.md).
    one_pass: both views go through the network as one batch. Each keeps its own batch statistics: the result is the
    same. It is faster where the network is compiled (bench/NOTES.md).
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: str,
        lambd: float,
        loss_scale: float = 1.0,
        one_pass: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = build_projector(backbone.out_features, projector)
        self.lambd, self.loss_scale, self.one_pass = lambd, loss_scale, one_pass
        for module in self.modules():
            if isinstance(module, (BatchNorm1d, BatchNorm2d)):
                module.views = 1 + one_pass

    def forward(self, view_a: Tensor, view_b: Tensor) -> BarlowTwinsOutput:
        passes = [torch.cat([view_a, view_b])] if self.one_pass else [view_a, view_b]
        return self.compare([self.backbone(views) for views in passes])

    def compare(self, features: Sequence[Tensor]) -> BarlowTwinsOutput:
        """From features, [B, F] of each view or [2 B, F] of both, to the loss."""
        embeddings = [self.projector(f) for f in features]
        if self.one_pass:
            features, embeddings = features[0].chunk(2), embeddings[0].chunk(2)
        with torch.autocast(
            embeddings[0].device.type, enabled=False
        ):  # squares underflow in half precision
            # [B, D] each, by the statistics of this view's batch alone
            a, b = (
                normalize(z.to(torch.promote_types(z.dtype, torch.float32))) for z in embeddings
            )
            parts = barlow_loss(a, b, self.lambd)
        parts = parts._replace(loss=parts.loss * self.loss_scale)
        return BarlowTwinsOutput(parts, features[0].detach(), a.detach(), b.detach())


def build_network(config: NetworkConfig, *, one_pass: bool = False) -> BarlowTwins:
    """Build the network of a configuration with random weights, on the current default device.

    Args:
        config: Architecture and loss.
        one_pass: Whether both views go through the network as one batch (see `BarlowTwins`).

    Raises:
        ValueError: The backbone, its width or the projector is not valid.
    """
    backbone = build_backbone(config.backbone, config.width, config.small_stem)
    return BarlowTwins(
        backbone, config.projector, config.lambd, config.loss_scale, one_pass=one_pass
    )


def build_projector(in_features: int, widths: str) -> nn.Sequential:
    """Linear layers of the given widths ("8192-8192-8192"), without bias; batch norm and ReLU between them."""
    try:
        sizes = [in_features, *(int(width) for width in widths.split("-"))]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(
            f"projector is {widths!r}: give the widths of its layers, like 8192-8192-8192"
        )
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=False), BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
