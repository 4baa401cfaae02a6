"""Features of images: from a frozen network, or computed directly from the pixels.

`feature_metrics.py` measures features without labels, `knn.py` and `linear_probe.py` with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Batches = Iterable[tuple[tuple[Tensor, ...], Tensor, Tensor]]
"""Batches of (views, each [B, 3, S, S]; labels [B]; samples [B])."""


@torch.no_grad()
# A network that is compiled for training would be compiled again for evaluation mode.
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def extract_features(
    batches: Batches, features: dict[str, Callable[[Tensor], Tensor]], rows: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute features of all images in one pass over the batches.

    Args:
        batches: The first view of each batch is used.
        features: Functions of a view [B, 3, S, S]. Networks must be in evaluation mode.
        rows: At least the number of images. Memory for so many rows is allocated at the first
            batch; without `rows`, the features are in memory twice for a moment.

    Returns:
        Each feature, [n, F] float32, and the labels [n], on the device of the batches.
    """
    feature_rows = {name: _Rows(rows) for name in features}
    # With `rows` the labels have a tensor too: many small tensors that stay in memory would
    # fragment it for the large ones (on a CPU that took 75% more memory).
    label_rows = _Rows(rows)
    n = 0
    for (view, *_), labels, _ in batches:
        for name, feature in features.items():
            feature_rows[name].append(feature(view).float().flatten(1))
        label_rows.append(labels)
        n += len(labels)

    if n == 0:
        return {name: torch.empty(0, 0) for name in features}, torch.empty(0, dtype=torch.int64)
    return {name: part.joined() for name, part in feature_rows.items()}, label_rows.joined()


class _Rows:
    """A tensor whose rows arrive in parts."""

    def __init__(self, capacity: int | None) -> None:
        """With a `capacity`, parts are copied into one tensor of so many rows as they arrive."""
        self._capacity = capacity
        self._parts: list[Tensor] = []
        self._allocated: Tensor | None = None
        self._filled = 0

    def append(self, part: Tensor) -> None:
        if self._capacity is None:
            self._parts.append(part)
            return
        if self._allocated is None:
            self._allocated = part.new_empty(self._capacity, *part.shape[1:])
        end = self._filled + len(part)
        self._allocated[self._filled : end] = part
        self._filled = end

    def joined(self) -> Tensor:
        if self._allocated is None:
            return torch.cat(self._parts)
        return self._allocated[: self._filled]


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """The number of correct top-1 and top-5 predictions, int64 [2].

    Args:
        scores: [m, C]; with fewer than five classes, top-5 is among all of them.
        labels: [m]
    """
    is_label = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # [m, 5]
    return torch.stack((is_label[:, 0].sum(), is_label.sum()))


def colour_feature(view: Tensor, bins: int = 6) -> Tensor:
    """The square roots of a joint colour histogram, [B, bins^3], of a normalised view [B, 3, S, S].

    Their cosine similarity is the Bhattacharyya coefficient of the histograms. The bins span -2.2
    to 2.7, which is black to white after normalisation by ImageNet's mean and standard deviation.
    """
    level = ((view + 2.2) / 4.9 * bins).long().clamp_(0, bins - 1)  # [B, 3, S, S]
    colour = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)  # [B, S S]
    ones = torch.ones_like(colour, dtype=view.dtype)
    counts = view.new_zeros(len(view), bins**3).scatter_add_(1, colour, ones)
    return (counts / colour.shape[1]).sqrt()


def pixel_feature(view: Tensor) -> Tensor:
    """The pixels of a normalised view [B, 3, S, S] as a feature, [B, 3 S S].

    Larger views are averaged down to 48 pixels: 50,000 views of 224 pixels would take 30 GB.
    """
    return F.adaptive_avg_pool2d(view, min(48, view.shape[-1])).flatten(1)
