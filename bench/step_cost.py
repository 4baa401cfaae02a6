"""What a training step costs at least: the operations that it computes and the bytes that it moves.

Both are counted, not estimated: a forward and a backward pass of one view run on torch's "meta"
device, where shapes are tracked and nothing is computed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from experiment import ModelConfig

# Images in the pass that is counted. Large, so that the traffic of the parameters, which occurs
# once per step, is a small part.
_BATCH = 256
_VIEWS = 2


def step_flop(network: ModelConfig, size: int) -> float:
    """Floating-point operations per image of backbone and projector in a training step."""
    with FlopCounterMode(display=False) as counter:
        _run_one_view(network, size)
    return _VIEWS * counter.get_total_flops() / _BATCH


def step_traffic(network: ModelConfig, size: int, dtype: torch.dtype, fused: bool = False) -> float:
    """Bytes per image that a training step reads and writes at least, in a large batch.

    Each operation of backbone and projector reads its inputs and writes its outputs.

    Args:
        network: The network.
        size: Side of a view, pixels.
        dtype: Type of the activations.
        fused: Whether ReLUs cost nothing, because the operations before them apply them as well.
    """
    with TrafficCounter(fused) as counter:
        _run_one_view(network, size)
    return _VIEWS * counter.elements * dtype.itemsize / _BATCH


class TrafficCounter(TorchDispatchMode):
    """Counts the tensor elements that operations read and write within the block."""

    # The number of leading inputs that an operation reads twice. Batch norm needs the moments
    # before it can normalise, and the backward pass of a convolution is two products with the
    # gradient.
    _READ_TWICE: ClassVar = {
        "native_batch_norm": 1,
        "native_batch_norm_backward": 2,
        "convolution_backward": 1,
    }
    _RELU: ClassVar = {"relu_", "threshold_backward"}

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.elements = 0
        self._free = self._RELU if fused else set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if operation.is_view or name in self._free:
            return result
        read_again = args[: self._READ_TWICE.get(name, 0)]
        for value in tree_leaves((args, result, read_again)):
            if isinstance(value, torch.Tensor):
                self.elements += value.numel()
        return result


def _run_one_view(network: ModelConfig, size: int) -> None:
    """A forward and backward pass of one view of `_BATCH` images, without computing anything."""
    with torch.device("meta"):
        twins = model.build_network(network)
        view = torch.empty(_BATCH, 3, size, size)
    twins.projector(twins.backbone(view)).sum().backward()
