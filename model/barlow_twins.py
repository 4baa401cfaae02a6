"""The Barlow Twins network: a backbone and a projector shared by both views, and their loss.

`build_network` makes it from a configuration. The loss itself is in loss.py, the backbone in
backbone.py, and the batch normalisation, which keeps the statistics of the views apart, in
batch_norm.py.
"""

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
    """The settings that `build_network` reads; `experiment.config.ModelConfig` has them."""

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
    """The loss of two views with its parts, and the detached tensors that it was computed from."""

    parts: LossParts
    features: Tensor  # [B, F], of view a
    a: Tensor  # [B, D], normalised embeddings of view a
    b: Tensor  # [B, D], of view b

    @property
    def loss(self) -> Tensor:
        """The scalar to call `backward` on."""
        return self.parts.loss


class BarlowTwins(nn.Module):
    """Barlow Twins (Zbontar et al. 2021): backbone, projector and loss.

    Shapes:
        - Input: two views of the same images, each [B, 3, S, S].
        - Output: a `BarlowTwinsOutput`.

    Args:
        backbone: Network from images [B, 3, S, S] to features [B, F].
        projector: Widths of the projector's linear layers, "8192-8192-8192" in the paper.
        lambd: Weight of the off-diagonal terms of the loss.
        loss_scale: Factor on the loss. It changes only the updates of parameters that LARS does
            not adapt (see docs/method.md).
        one_pass: Whether both views go through the network as one batch [2 B, 3, S, S]. Each view
            keeps its own batch statistics, so the result is the same. This is faster if the
            network is compiled (see bench/NOTES.md).

    Example::

        model = BarlowTwins(build_backbone("resnet18"), projector="512-512-512", lambd=0.0051)
        model(view_a, view_b).loss.backward()
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
        self.lambd = lambd
        self.loss_scale = loss_scale
        self.one_pass = one_pass
        for module in self.modules():
            if isinstance(module, (BatchNorm1d, BatchNorm2d)):
                module.views = 2 if one_pass else 1

    def forward(self, view_a: Tensor, view_b: Tensor) -> BarlowTwinsOutput:
        if self.one_pass:
            features = [self.backbone(torch.cat([view_a, view_b]))]  # [2 B, F]
        else:
            features = [self.backbone(view_a), self.backbone(view_b)]  # [B, F] each
        return self.compare_features(features)

    def compare_features(self, features: Sequence[Tensor]) -> BarlowTwinsOutput:
        """Compute the embeddings and the loss from the features of the backbone.

        Args:
            features: With `one_pass`, one tensor [2 B, F]; otherwise [B, F] for each view.
        """
        embeddings: Sequence[Tensor] = [self.projector(f) for f in features]
        if self.one_pass:
            features = features[0].chunk(2)
            embeddings = embeddings[0].chunk(2)

        # Float32 with autocast off: squares underflow in half precision.
        with torch.autocast(embeddings[0].device.type, enabled=False):
            z_a, z_b = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings)
            a = normalize(z_a)  # [B, D], by the batch statistics of this view alone
            b = normalize(z_b)
            parts = barlow_loss(a, b, self.lambd)

        parts = parts._replace(loss=parts.loss * self.loss_scale)
        return BarlowTwinsOutput(parts, features[0].detach(), a.detach(), b.detach())


def build_network(config: NetworkConfig, *, one_pass: bool = False) -> BarlowTwins:
    """Build the network of a configuration with random weights, on the current default device.

    Args:
        config: The architecture and the loss.
        one_pass: Whether both views go through the network as one batch (see `BarlowTwins`).

    Raises:
        ValueError: The backbone, its width or the projector is not valid.
    """
    backbone = build_backbone(config.backbone, config.width, config.small_stem)
    return BarlowTwins(
        backbone, config.projector, config.lambd, config.loss_scale, one_pass=one_pass
    )


def build_projector(in_features: int, widths: str) -> nn.Sequential:
    """Build linear layers without bias, with batch normalisation and ReLU between them.

    Args:
        in_features: Width of the input.
        widths: Output widths of the layers, like "8192-8192-8192".

    Raises:
        ValueError: `widths` is not a list of positive numbers.
    """
    sizes = [in_features, *_parse_widths(widths)]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers.append(nn.Linear(before, after, bias=False))
        layers.append(BatchNorm1d(after))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    return nn.Sequential(*layers)


def _parse_widths(widths: str) -> list[int]:
    """[8192, 8192, 8192] from "8192-8192-8192"."""
    try:
        sizes = [int(width) for width in widths.split("-")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"projector is {widths!r}: give the widths of its layers, like 8192-8192-8192"
        )
    return sizes
