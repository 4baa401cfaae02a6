"""torchvision's ResNets without their classifier, optionally narrow and with a stem for small images."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

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
        self._width = width
        super().__init__(block, layers, zero_init_residual=True)
        self.out_features = 8 * width * block.expansion
        self.fc = nn.Identity()
        if small_stem or width != 64:
            kernel, stride = (3, 1) if small_stem else (7, 2)
            self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)
        if small_stem:
            self.maxpool = nn.Identity()

    def _make_layer(self, block: type[BasicBlock | Bottleneck], planes: int, *rest: int, **named: int) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // 64, *rest, **named)


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
