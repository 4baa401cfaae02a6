"""Features of images from a network that rests, and what can be read from them without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Batches = Iterable[
    tuple[tuple[Tensor, ...], Tensor, Tensor]
]  # views each [B, 3, S, S], labels [B], samples [B]

_BLOCK = 1024  # rows that are read at once in float64


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # in evaluation mode a network that trains compiled would be compiled anew
def extract(
    batches: Batches, features: dict[str, Callable[[Tensor], Tensor]], rows: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Each feature of every image, [n, F] float32, and the labels [n], on the device of the batches, in one pass.

    `features` are functions of a view [B, 3, S, S]; a network among them is to be in evaluation mode. rows: no fewer
    than the images. Their place is then taken beforehand; without it the features are held twice for a moment.
    """
    # None: the labels. With `rows`, one tensor each, filled as they come: the labels too, since many small pieces that
    # stay would break up the memory in which the large ones come and go (on a CPU that cost three quarters more).
    kept: dict[str | None, list[Tensor]] = {}
    n = 0
    for (view, *_), labels, _ in batches:
        parts = {name: feature(view).float().flatten(1) for name, feature in features.items()}
        for name, part in (None, labels), *parts.items():
            if rows is None:
                kept.setdefault(name, []).append(part)
                continue
            if name not in kept:
                kept[name] = [part.new_empty(rows, *part.shape[1:])]
            kept[name][0][n : n + len(part)] = part
        n += len(labels)
    if not n:
        return {name: torch.empty(0, 0) for name in features}, torch.empty(0, dtype=torch.int64)
    whole = {
        name: torch.cat(parts) if rows is None else parts[0][:n] for name, parts in kept.items()
    }
    return {name: whole[name] for name in features}, whole[None]


def right(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of scores [m, C] have their label [m] first, and among the first five (or all, of fewer): int64 [2]."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # [m, 5]
    return torch.stack((hits[:, 0].sum(), hits.sum()))


def effective_rank(features: Tensor, rows: int = 25_600) -> float:
    """The exponential of the entropy of the singular values' shares: between 1 and F, for features [n, F].

    RankMe (Garrido et al. 2023, arXiv 2210.02885) on as many rows as there, at most. As there, the matrix is neither
    centred nor normalised; unlike there, it need not be the projector's output, which most weights come without, and no
    1e-7 is added to the shares. In float64, from F x F products: a share below 1e-8 is lost. NaN of what is not finite.
    """
    features = _evenly(features, rows).double()
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(features.T @ features).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


def feature_alignment(a: Tensor, b: Tensor) -> float:
    """The mean squared distance of directions a, b [n, F] of two views of the same images: 0 for the same, at most 4.

    Wang and Isola 2020 (arXiv 2005.10242) with their alpha of 2; lower is better.
    """
    parts = zip(a.split(_BLOCK), b.split(_BLOCK), strict=True)
    return sum(float((_directions(x) - _directions(y)).square().sum()) for x, y in parts) / len(a)


def feature_uniformity(features: Tensor, rows: int = 10_000) -> float:
    """The logarithm of the mean of exp(-2 d^2) over all pairs of directions of features [n, F] at distance d.

    Wang and Isola 2020 with their t of 2; lower is better: 0 where all are the same, near -4 where they fill a sphere
    of many dimensions. Of at most `rows`, whose pairs are enough: the work grows with their square.
    """
    x = _directions(_evenly(features, rows))
    total = 0.0
    for first in range(0, len(x), _BLOCK):
        cosine = x[first : first + _BLOCK] @ x[first:].T  # d^2 = 2 - 2 cosine
        total += float((4 * cosine - 4).exp().triu(1).sum())  # each pair once
    return math.log(total / (len(x) * (len(x) - 1) / 2)) if len(x) > 1 else math.nan


def _evenly(features: Tensor, rows: int) -> Tensor:
    """At most so many rows, evenly spaced: those of a folder are in the order of their classes."""
    if len(features) <= rows:
        return features
    return features[
        torch.linspace(0, len(features) - 1, rows, dtype=torch.float64).long().to(features.device)
    ]


def _directions(features: Tensor) -> Tensor:
    return F.normalize(features.double())


def colour_feature(view: Tensor, bins: int = 6) -> Tensor:
    """Square roots of a joint colour histogram, [B, bins^3], of a normalised view [B, 3, S, S].

    Their cosine is the Bhattacharyya coefficient of the histograms. The bins span what ImageNet's mean and deviation
    make of black and white: -2.2 to 2.7.
    """
    level = ((view + 2.2) / 4.9 * bins).long().clamp_(0, bins - 1)  # [B, 3, S, S]
    colour = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)  # [B, S S]
    counts = view.new_zeros(len(view), bins**3).scatter_add_(
        1, colour, torch.ones_like(colour, dtype=view.dtype)
    )
    return (counts / colour.shape[1]).sqrt()


def pixel_feature(view: Tensor) -> Tensor:
    """The normalised pixels, [B, 3 S S], of views above 48 pixels averaged down to those: 50,000 of 224 fill 30 GB."""
    return F.adaptive_avg_pool2d(view, min(48, view.shape[-1])).flatten(1)
