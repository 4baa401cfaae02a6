"""torchvision's ResNets without their classifier, optionally narrow and with a stem for small images."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .batch_norm import BatchNorm2d, recomputing

BACKBONES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


class Backbone(ResNet):
    """A torchvision ResNet whose output is the pooled feature, [B, out_features] for images [B, 3, S, S].

    Its `state_dict` has torchvision's names without `fc`, and loads into torchvision's own ResNet at width 64.
    """

    def __init__(self, name: str, width: int = 64, small_stem: bool = False) -> None:
        block, layers = BACKBONES[name]
        # Blocks are made by the method below, in the width that the first of the four stages has here.
        self.width = width
        super().__init__(block, layers, zero_init_residual=True, norm_layer=BatchNorm2d)
        self.name = name
        self.out_features = 8 * width * block.expansion
        self.fc = nn.Identity()
        if small_stem or width != 64:
            kernel, stride = (3, 1) if small_stem else (7, 2)
            self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = BatchNorm2d(width)
        if small_stem:
            self.maxpool = nn.Identity()

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, *rest: int, **named: int
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.width
        return _Stage(*super()._make_layer(block, planes * self.width // 64, *rest, **named))

    def recompute_activations(self) -> None:
        """From now on, keep a residual block's input alone for the backward pass, which computes the rest again."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            stage.recompute = True


class _Stage(nn.Sequential):
    """Residual blocks, one after the other."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and self.training):
            return super().forward(x)
        for block in self:
            if (
                torch.compiler.is_compiling()
            ):  # whose graph updates the running averages once in any case
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(
                    block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing())
                )
        return x


def build_backbone(name: str, width: int = 64, small_stem: bool = False) -> Backbone:
    """A ResNet with random weights and zero-initialised residual branches.

    width: channels of the first stage, 64 in the published networks.
    small_stem: a 3x3 convolution of stride 1 and no max-pool in place of the 7x7 of stride 2: for 32 px images.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if width < 1:
        raise ValueError(f"width is {width}: it must be at least 1 channel")
    return Backbone(name, width, small_stem)
