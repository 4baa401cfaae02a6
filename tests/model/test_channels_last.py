"""Activations, gradients and weights are channels-last: a layer that is not would cause copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import LARS, BarlowTwins, build_backbone, parameter_groups


def is_channels_last(x: Tensor) -> bool:
    """By its strides. With only one channel or one pixel, every order is the same."""
    _, channels, height, width = x.shape
    if channels == 1 or height * width == 1:
        return True
    return x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1


class RecordedCopies(TorchDispatchMode):
    """Operations that copy a tensor of images without changing its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("clone", "copy_", "contiguous", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            only_converts_dtype = (
                source.dtype != result.dtype and source.stride() == result.stride()
            )
            has_pixels = result.ndim >= 4 and result.shape[-2:].numel() > 1
            if has_pixels and not only_converts_dtype:
                self.copies.append(
                    f"{name} of {tuple(source.shape)} {source.stride()} to {result.stride()}"
                )
        return result


class LayoutCheck:
    """Hooks that check activations and gradients of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        self.checked = {"activation": 0, "gradient": 0}
        self.wrong: list[str] = []
        # torch writes the gradient of the pooling channels-first, that is of the last stage and of
        # its last block.
        last_block = f"layer4.{len(backbone.layer4) - 1}"
        self._exceptions = {("gradient", "layer4"), ("gradient", last_block)}
        for name, module in backbone.named_modules():
            if not isinstance(module, nn.ReLU):  # it works in place: its input is gone
                module.register_forward_hook(
                    lambda module, args, output, name=name: self._check_output(name, output)
                )

    def _check_output(self, name: str, output: Tensor) -> None:
        self._check("activation", name, output)
        if output.requires_grad and output.ndim == 4:
            output.register_hook(lambda grad: self._check("gradient", name, grad))

    def _check(self, kind: str, name: str, tensors: object) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.ndim == 4:
                self.checked[kind] += 1
                if not is_channels_last(x) and (kind, name) not in self._exceptions:
                    self.wrong.append(f"{kind} of {name}: {tuple(x.shape)} {x.stride()}")


def train_one_step(network: nn.Module, views: Sequence[Tensor], dtype: torch.dtype) -> LARS:
    optimizer = LARS(parameter_groups(network, 1e-6), lr=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = network(*views).loss
    loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_no_tensor_is_transposed_in_a_step(
    backbone: str, dtype: torch.dtype, one_pass: bool
) -> None:
    torch.manual_seed(0)
    network = BarlowTwins(build_backbone(backbone, 8), "32-32-32", 0.005, one_pass=one_pass)
    network = network.to(memory_format=torch.channels_last)
    views = [torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    check = LayoutCheck(network.backbone)
    with RecordedCopies() as recorded:
        optimizer = train_one_step(network, views, dtype)

    for p in network.parameters():
        if p.ndim == 4:
            assert is_channels_last(p)
            assert is_channels_last(p.grad)
            assert is_channels_last(optimizer.state[p]["mu"])
    assert check.checked["activation"] == check.checked["gradient"] > 50
    assert not check.wrong
    assert not recorded.copies
