"""torchvision's ResNets without the classifier, in any width, with a stem for small images."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .batch_norm import BatchNorm2d, freeze_running_averages

BACKBONES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}
"""Block type and number of blocks in each of the four stages."""

_PUBLISHED_WIDTH = 64


class Backbone(ResNet):
    """A torchvision ResNet that returns the pooled features.

    Its `state_dict` has torchvision's names without `fc`. At width 64 it loads into torchvision's
    own ResNet. Use `build_backbone` to make one.

    Shapes:
        - Input: images [B, 3, S, S].
        - Output: features [B, out_features].
    """

    def __init__(self, name: str, width: int = _PUBLISHED_WIDTH, small_stem: bool = False) -> None:
        block, layers = BACKBONES[name]
        self.width = width  # _make_layer, which torchvision's constructor calls, reads it
        super().__init__(block, layers, zero_init_residual=True, norm_layer=BatchNorm2d)

        self.name = name
        self.out_features = 8 * width * block.expansion
        self.fc = nn.Identity()
        if small_stem or width != _PUBLISHED_WIDTH:
            self._replace_stem(small_stem)

    def recompute_activations(self) -> None:
        """Save memory in training by computing activations again in the backward pass.

        From then on, only the input of each residual block is kept. Results are the same bits.
        """
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            stage.recompute = True

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, *rest: int, **named: int
    ) -> nn.Sequential:
        """One stage, with its channels scaled to `width`."""
        is_first_stage = planes == _PUBLISHED_WIDTH
        if is_first_stage:
            self.inplanes = self.width
        scaled_planes = planes * self.width // _PUBLISHED_WIDTH
        return _Stage(*super()._make_layer(block, scaled_planes, *rest, **named))

    def _replace_stem(self, small_stem: bool) -> None:
        """The first convolution in another width, and for small images also at full resolution."""
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, self.width, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = BatchNorm2d(self.width)
        if small_stem:
            self.maxpool = nn.Identity()


class _Stage(nn.Sequential):
    """Residual blocks in sequence, with optional activation checkpointing."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and self.training):
            return super().forward(x)
        for block in self:
            x = _checkpointed(block, x)
        return x


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Apply `block`, keeping only its input for the backward pass."""
    if torch.compiler.is_compiling():
        # The compiled graph updates the running averages only once in any case.
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), freeze_running_averages()),
    )


def build_backbone(name: str, width: int = _PUBLISHED_WIDTH, small_stem: bool = False) -> Backbone:
    """Build a ResNet with random weights and zero-initialised residual branches.

    Args:
        name: A key of `BACKBONES`.
        width: Channels of the first stage, 64 in the published networks.
        small_stem: For 32-pixel images: a 3x3 convolution with stride 1 and no max-pool in place
            of the 7x7 convolution with stride 2.

    Raises:
        ValueError: The name is unknown, or the width is less than 1.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if width < 1:
        raise ValueError(f"width is {width}: it must be at least 1 channel")
    return Backbone(name, width, small_stem)
