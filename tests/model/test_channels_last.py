"""The network keeps its activations, gradients and weights channels-last: a layer that does not makes others copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import LARS, BarlowTwins, build_backbone, parameter_groups


def is_channels_last(x: Tensor) -> bool:
    """By its strides; where there is one channel or one pixel alone, every order is the same."""
    _, channels, height, width = x.shape
    if channels == 1 or height * width == 1:
        return True
    return x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1


class Copies(TorchDispatchMode):
    """Operations that write a tensor of images anew without changing its values' type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, given=(), options=None):  # type: ignore[no-untyped-def]
        result, name = operation(*given, **(options or {})), operation.overloadpacket.__name__
        if name in ("clone", "copy_", "contiguous", "_to_copy"):
            source = given[1] if name == "copy_" else given[0]
            anew = source.dtype == result.dtype or source.stride() != result.stride()
            if anew and result.ndim >= 4 and result.shape[-2:].numel() > 1:
                self.found.append(
                    f"{name} of {tuple(source.shape)} {source.stride()} to {result.stride()}"
                )
        return result


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_nothing_is_transposed_in_a_step(backbone: str, dtype: torch.dtype, one_pass: bool) -> None:
    torch.manual_seed(0)
    network = BarlowTwins(build_backbone(backbone, 8), "32-32-32", 0.005, one_pass=one_pass)
    network = network.to(memory_format=torch.channels_last)
    optimizer = LARS(parameter_groups(network, 1e-6), lr=0.1)
    views = [torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    wrong: list[str] = []
    seen = {"activation": 0, "gradient": 0}
    # What pooling spreads over its pixels is the one gradient that torch writes channels-first: of the last stage, and
    # of its last block.
    spread = {
        ("gradient", f"backbone.layer4{block}")
        for block in ("", f".{len(network.backbone.layer4) - 1}")
    }

    def check(what: str, name: str, tensors: object) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.ndim == 4:
                seen[what] += 1
                if not is_channels_last(x) and (what, name) not in spread:
                    wrong.append(f"{what} of {name}: {tuple(x.shape)} {x.stride()}")

    def after(name: str, module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        check("activation", name, result)
        if result.requires_grad and result.ndim == 4:
            result.register_hook(lambda grad: check("gradient", name, grad))

    for name, module in network.named_modules():
        if name.startswith("backbone.") and not isinstance(
            module, nn.ReLU
        ):  # in place: a hook would see what was
            module.register_forward_hook(
                lambda m, given, result, name=name: after(name, m, given, result)
            )
    with Copies() as copies:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = network(*views).loss
        loss.backward()
        optimizer.step()
    for p in network.parameters():
        if p.ndim == 4:
            assert is_channels_last(p)
            assert is_channels_last(p.grad)
            assert is_channels_last(optimizer.state[p]["mu"])
    assert seen["activation"] == seen["gradient"] > 50
    assert not wrong
    assert not copies.found
