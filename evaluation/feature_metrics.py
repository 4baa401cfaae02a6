"""Measures of features that need no labels: effective rank, alignment and uniformity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1024  # rows that are converted to float64 at once


def rankme(features: Tensor, rows: int = 25_600) -> float:
    """The effective rank (RankMe) of features [n, F], between 1 and F.

    It is the exponential of the entropy of the singular values, divided by their sum (Garrido et
    al. 2023, arXiv 2210.02885). At most `rows` rows are used, as in the paper, and they are
    neither centred nor normalised. Two differences from the paper: features of the backbone are
    allowed, since most published weights have no projector, and 1e-7 is not added to the shares.

    This is not the `effective_rank` in metrics.jsonl, which detects collapse during training
    (`model.feature_readings`): that one uses 256 rows of one batch, each scaled to length 1.

    Computed in float64 from F x F products, which loses singular values below 1e-8 of the sum.
    Returns NaN if a feature is not finite.
    """
    features = _evenly_spaced(features, rows).double()
    if not features.isfinite().all():
        return math.nan
    singular_values = torch.linalg.eigvalsh(features.T @ features).clamp(min=0).sqrt()
    shares = singular_values / singular_values.sum()
    return float(torch.special.entr(shares).sum().exp())


def feature_alignment(a: Tensor, b: Tensor) -> float:
    """The mean squared distance between normalised features of two views of the same images.

    From 0 (identical) to 4; lower is better. Wang and Isola 2020 (arXiv 2005.10242), with alpha 2.

    Args:
        a: Features of the first views [n, F].
        b: Features of the second views [n, F].
    """
    total = 0.0
    for x, y in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True):
        total += float((_normalised(x) - _normalised(y)).square().sum())
    return total / len(a)


def feature_uniformity(features: Tensor, rows: int = 10_000) -> float:
    """The logarithm of the mean of exp(-2 d^2) over all pairs of normalised features [n, F].

    d is the distance of a pair. Lower is better: 0 if all features are equal, near -4 if they are
    uniform on a sphere of many dimensions. Wang and Isola 2020 (arXiv 2005.10242), with t 2.

    At most `rows` rows are used, since the work grows with their square. Returns NaN if there is
    no pair.
    """
    x = _normalised(_evenly_spaced(features, rows))
    if len(x) < 2:
        return math.nan
    total = 0.0
    for first in range(0, len(x), _BLOCK):
        cosine = x[first : first + _BLOCK] @ x[first:].T
        potential = (4 * cosine - 4).exp()  # d^2 = 2 - 2 cosine
        total += float(potential.triu(1).sum())  # each pair once
    pairs = len(x) * (len(x) - 1) / 2
    return math.log(total / pairs)


def _evenly_spaced(features: Tensor, rows: int) -> Tensor:
    """At most `rows` rows, evenly spaced: images of a folder are sorted by their classes."""
    if len(features) <= rows:
        return features
    positions = torch.linspace(0, len(features) - 1, rows, dtype=torch.float64).long()
    return features[positions.to(features.device)]


def _normalised(features: Tensor) -> Tensor:
    return F.normalize(features.double())
