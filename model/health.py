"""Whether the network learns or collapses: readings of its features and embeddings, and warnings in words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .barlow_twins import BarlowTwinsOutput
from .distributed import all_reduce_identity_grad, world_size

_ROWS = 256  # images that are looked at: the singular values of more take longer than a step
_FALLEN = (
    1 / 10
)  # of the highest so far: a warning. (The demo's rank falls from 70 to 10, and it learns.)


@torch.no_grad()
def feature_readings(features: Tensor) -> dict[str, float]:
    """Of features [B, F], B of any size: how far apart they lie, and how many dimensions they use.

    feature_deviation: the standard deviation of the features' directions, 0 where all images look the same, at most 1.
    effective_rank: the exponential of the entropy of the singular values (RankMe, Garrido et al. 2023), of 256 rows.
    """
    directions = F.normalize(features[:_ROWS].float())
    if not directions.isfinite().all():
        return {"feature_deviation": math.nan, "effective_rank": math.nan}
    share = torch.linalg.svdvals(directions)
    share = share / share.sum()
    entropy = -(share * (share + 1e-7).log()).sum()
    deviation = (1 - directions.mean(0).square().sum()).clamp(min=0).sqrt()
    return {"feature_deviation": float(deviation), "effective_rank": math.exp(float(entropy))}


def readings(twins: BarlowTwinsOutput) -> dict[str, float]:
    """All that is written about a step: the parts of its loss, and its features. Waits for the device."""
    return {
        name: float(value.detach()) for name, value in twins.parts._asdict().items()
    } | feature_readings(twins.features)


def correlation_steps(steps: int) -> set[int]:
    """The steps of a run after which the correlation matrix is kept: more at the beginning, when it changes most."""
    return {round(fraction * (steps - 1)) for fraction in (0, 0.01, 0.03, 0.1, 0.3, 0.6, 1)}


@torch.no_grad()
def correlation_corner(a: Tensor, b: Tensor, dimensions: int = 64) -> Tensor:
    """C of the first dimensions of normalised embeddings a, b [N, D], over the global batch: float16 on the CPU."""
    corner = all_reduce_identity_grad(a[:, :dimensions].T @ b[:, :dimensions]) / (
        len(a) * world_size()
    )
    return corner.half().cpu()


def save_correlation(path: Path, twins: BarlowTwinsOutput) -> None:
    """That corner as a file of numpy's."""
    np.save(path, correlation_corner(twins.a, twins.b).numpy())


_WORDS = {
    "feature_deviation": "the features of different images are becoming the same",
    "effective_rank": "the features are falling back on ever fewer dimensions",
}


class CollapseMonitor:
    """Notices that features have fallen far below what they were, and says so once each time."""

    def __init__(self, highest: dict[str, float] | None = None) -> None:
        """highest: `highest` of the run that this one goes on with."""
        self.highest = highest or dict.fromkeys(_WORDS, 0.0)
        self._said: set[str] = set()

    def warning(self, readings: dict[str, float]) -> str | None:
        """A sentence about readings that are below a tenth of their highest; none twice before they have recovered."""
        found = []
        for name, words in _WORDS.items():
            now, highest = readings[name], max(self.highest[name], readings[name])
            self.highest[name] = highest
            if now > 2 * _FALLEN * highest:
                self._said.discard(name)
            elif now <= _FALLEN * highest and name not in self._said:
                self._said.add(name)
                found.append(f"{words} ({name.replace('_', ' ')} {now:.3g}, it was {highest:.3g})")
        return (
            f"collapse? {'; '.join(found)}: a lower --lr or a longer --warmup-epochs may help"
            if found
            else None
        )
