"""Batch normalisation with the statistics of each view, over the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import all_gather, world_size


class _OfEachView:
    """torch's batch norm, but for two things while it trains.

    The rows of a batch may be those of several views, one after the other (`views`): each is normalised by its own
    moments, and the running averages are updated by one after the other, as in separate passes. And with several ranks
    the moments are those of the global batch. In plain operations, which the compiler fuses, the exchange of moments
    among them. (torch's SyncBatchNorm runs on GPUs alone, and breaks the compiler's graph.)
    """

    views = 1
    training: bool
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor
    bias: Tensor
    momentum: float
    eps: float
    recomputing = (
        False  # a second time within one step: the running averages have been updated already
    )

    def forward(self, x: Tensor) -> Tensor:
        """x [views * B, C] or [views * B, C, H, W], B on each rank alike."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.views == world_size() == 1:
            averages = (self.running_mean, self.running_var)
            if _OfEachView.recomputing:
                averages = (self.running_mean.clone(), self.running_var.clone())
            self.num_batches_tracked.add_(not _OfEachView.recomputing)
            return F.batch_norm(x, *averages, self.weight, self.bias, True, self.momentum, self.eps)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        y = x.unflatten(0, (self.views, -1))  # [views, B, C, ...]
        within = (1, *range(3, y.ndim))
        # By sums, whose gradients torch spreads by strides of 0: those of var_mean it would write channels-first.
        m = y.numel() // (y.shape[0] * y.shape[2])
        mean = y.sum(within, keepdim=True) / m  # [views, 1, C, ...]
        variance = (y - mean).square().sum(within, keepdim=True) / m
        if world_size() > 1:
            moments = all_gather(torch.stack([mean, variance]))  # [W, 2, views, 1, C, ...]
            mean = moments[:, 0].mean(0)
            variance = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        if not _OfEachView.recomputing:
            with torch.no_grad():
                n = world_size() * m
                for view in range(self.views):
                    self.running_mean.lerp_(mean[view].flatten(), self.momentum)
                    self.running_var.lerp_(variance[view].flatten() * (n / (n - 1)), self.momentum)
                self.num_batches_tracked.add_(self.views)
        shape = (-1, *[1] * (y.ndim - 3))
        scale = (variance + self.eps).rsqrt() * self.weight.view(shape)
        # [views * B, C, ...]: a view of y's shape would make autograd copy where a ReLU changes it in place.
        mean, scale = (m.expand(-1, y.shape[1], *m.shape[2:]).flatten(0, 1) for m in (mean, scale))
        return ((x - mean) * scale + self.bias.view(shape)).to(dtype)


class BatchNorm1d(_OfEachView, nn.BatchNorm1d):  # type: ignore[misc]  # always with averages, weight and bias
    __doc__ = _OfEachView.__doc__


class BatchNorm2d(_OfEachView, nn.BatchNorm2d):  # type: ignore[misc]
    __doc__ = _OfEachView.__doc__


@contextmanager
def recomputing() -> Iterator[None]:
    """Within the block a forward pass is repeated for its activations: running averages stay as they are."""
    _OfEachView.recomputing = True
    try:
        yield
    finally:
        _OfEachView.recomputing = False
