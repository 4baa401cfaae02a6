"""Batch normalisation with separate statistics for each view, over the global batch of all ranks.

`BatchNorm1d` and `BatchNorm2d` are torch's layers with the same parameters and buffers. They differ
from them only in training mode:

- A batch may consist of several views (`views`). Each view is normalised by its own mean and
  variance, as if the views went through the network in separate passes.
- On several ranks, mean and variance are those of the global batch. (torch's SyncBatchNorm does
  that too, but only on GPUs, and it breaks the graph of torch.compile.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import all_gather, world_size


class _PerViewBatchNorm:
    """Mixin with the `forward` of both layers.

    Only plain differentiable operations, so that the compiler can fuse them.
    """

    views = 1
    """Number of views in a batch, one after the other along the first dimension."""

    averages_are_frozen = False
    """Whether running averages stay unchanged; for all layers, see `freeze_running_averages`."""

    training: bool
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor
    bias: Tensor
    momentum: float
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [views * B, C] or [views * B, C, H, W]; B is the same on each rank."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.views == 1 and world_size() == 1:
            return self._forward_one_view(x)
        return self._forward_views(x)

    def _forward_one_view(self, x: Tensor) -> Tensor:
        """One view on one rank: torch's own kernel, which is faster."""
        running_mean, running_var = self.running_mean, self.running_var
        if _PerViewBatchNorm.averages_are_frozen:
            running_mean, running_var = running_mean.clone(), running_var.clone()
        else:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, running_mean, running_var, self.weight, self.bias, True, self.momentum, self.eps
        )

    def _forward_views(self, x: Tensor) -> Tensor:
        """Several views or ranks: (x - mean) / sqrt(variance + eps) * weight + bias, per view."""
        input_dtype = x.dtype
        x = x.to(torch.promote_types(input_dtype, torch.float32))
        y = x.unflatten(0, (self.views, -1))  # [views, B, C, ...]
        mean, variance = _moments(y)  # [views, 1, C, ...]
        if not _PerViewBatchNorm.averages_are_frozen:
            n = world_size() * _values_per_channel(y)
            self._update_running_averages(mean, variance, n)

        # Parameters as [C, 1, 1] for images.
        per_channel = (-1, *[1] * (y.ndim - 3))
        scale = (variance + self.eps).rsqrt() * self.weight.view(per_channel)
        # Applied to x, not to its view y: autograd would copy a view that a ReLU changes in place.
        mean = _repeat_for_samples(mean, y)  # [views * B, C, ...]
        scale = _repeat_for_samples(scale, y)
        return ((x - mean) * scale + self.bias.view(per_channel)).to(input_dtype)

    def _update_running_averages(self, mean: Tensor, variance: Tensor, n: int) -> None:
        """Update them view after view, with the unbiased variance, as separate passes would.

        mean, variance: [views, 1, C, ...]. n: number of values that they were computed from.
        """
        with torch.no_grad():
            for view in range(self.views):
                self.running_mean.lerp_(mean[view].flatten(), self.momentum)
                self.running_var.lerp_(variance[view].flatten() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked.add_(self.views)


class BatchNorm1d(_PerViewBatchNorm, nn.BatchNorm1d):  # type: ignore[misc]  # never without averages
    """`torch.nn.BatchNorm1d` per view and over all ranks, for x [views * B, C]."""


class BatchNorm2d(_PerViewBatchNorm, nn.BatchNorm2d):  # type: ignore[misc]
    """`torch.nn.BatchNorm2d` per view and over all ranks, for x [views * B, C, H, W]."""


@contextmanager
def freeze_running_averages() -> Iterator[None]:
    """Keep the running averages of all layers unchanged within the block.

    For a forward pass that is repeated in the backward pass to recompute activations: the first one
    has updated the averages already.
    """
    _PerViewBatchNorm.averages_are_frozen = True
    try:
        yield
    finally:
        _PerViewBatchNorm.averages_are_frozen = False


def _values_per_channel(y: Tensor) -> int:
    """Number of values of one channel of one view on this rank. y: [views, B, C, ...]."""
    views, _, channels = y.shape[:3]
    return y.numel() // (views * channels)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each view over the global batch, each [views, 1, C, ...].

    Computed from sums, because torch expands the gradient of a sum with strides of 0. The gradient
    of `torch.var_mean` would be written to memory in channels-first order.
    """
    m = _values_per_channel(y)
    batch_and_space = (1, *range(3, y.ndim))
    mean = y.sum(batch_and_space, keepdim=True) / m
    variance = (y - mean).square().sum(batch_and_space, keepdim=True) / m
    if world_size() > 1:
        moments = all_gather(torch.stack([mean, variance]))  # [W, 2, views, 1, C, ...]
        rank_means, rank_variances = moments[:, 0], moments[:, 1]
        mean = rank_means.mean(0)
        variance = (rank_variances + (rank_means - mean).square()).mean(0)
    return mean, variance


def _repeat_for_samples(moments: Tensor, y: Tensor) -> Tensor:
    """[views * B, C, ...] from [views, 1, C, ...], one row for each sample of y."""
    return moments.expand(-1, y.shape[1], *moments.shape[2:]).flatten(0, 1)
