"""Readings that show during training whether the network learns or its features collapse."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .barlow_twins import BarlowTwinsOutput
from .distributed import all_reduce_identity_grad, world_size

# The singular values of more rows would take longer than a training step.
_ROWS = 256

# Features have collapsed if a reading falls to this fraction of its highest value. (In the demo,
# which learns, the rank falls from 70 to 10.)
_COLLAPSED = 1 / 10
_RECOVERED = 2 * _COLLAPSED

_SYMPTOMS = ("feature_deviation", "effective_rank")  # readings that fall if features collapse


@torch.no_grad()
def feature_readings(features: Tensor) -> dict[str, float]:
    """Measure how different the features of one batch are, from its first 256 rows.

    Both readings are of the features' directions, that is of the rows scaled to length 1. The
    effective rank is therefore not the one that evaluations report, which is RankMe on the raw
    features of many images.

    Args:
        features: Pooled features, [B, F].

    Returns:
        feature_deviation: The standard deviation of the directions, from 0 if all images have the
            same features up to 1.
        effective_rank: The exponential of the entropy of the singular values of the directions
            (after RankMe, Garrido et al. 2023): about the number of dimensions in use.

        Both are NaN if a feature is not finite.
    """
    directions = F.normalize(features[:_ROWS].float())
    if not directions.isfinite().all():
        return {"feature_deviation": math.nan, "effective_rank": math.nan}

    deviation = (1 - directions.mean(0).square().sum()).clamp(min=0).sqrt()
    return {
        "feature_deviation": float(deviation),
        "effective_rank": _effective_rank(directions),
    }


def _effective_rank(rows: Tensor) -> float:
    share = torch.linalg.svdvals(rows)
    share = share / share.sum()
    entropy = -(share * (share + 1e-7).log()).sum()
    return math.exp(float(entropy))


def readings(output: BarlowTwinsOutput) -> dict[str, float]:
    """All values to log for a step: the parts of the loss, and `feature_readings`.

    Waits for the device.
    """
    parts = {name: float(value.detach()) for name, value in output.parts._asdict().items()}
    return parts | feature_readings(output.features)


class CollapseMonitor:
    """Warns once when a reading falls to a tenth of its highest value so far.

    It warns again only after the reading has recovered.

    Args:
        highest: The attribute `highest` of the run that is resumed.

    Attributes:
        highest: The highest value so far of each reading, to be saved in checkpoints.
    """

    def __init__(self, highest: dict[str, float] | None = None) -> None:
        self.highest = highest or dict.fromkeys(_SYMPTOMS, 0.0)
        self._reported: set[str] = set()

    def warning(self, readings: dict[str, float]) -> str | None:
        """A sentence about readings that have collapsed since the last call, or None.

        Args:
            readings: Those of a step, as `readings` returns them.
        """
        symptoms = []
        for name in _SYMPTOMS:
            value = readings[name]
            highest = max(self.highest[name], value)
            self.highest[name] = highest
            if value > _RECOVERED * highest:
                self._reported.discard(name)
            elif value <= _COLLAPSED * highest and name not in self._reported:
                self._reported.add(name)
                label = name.replace("_", " ")
                symptoms.append(f"the {label} fell from {highest:.3g} to {value:.3g}")

        if not symptoms:
            return None
        advice = "a lower --lr or a longer --warmup-epochs may help"
        return f"possible collapse: {' and '.join(symptoms)}; {advice}"


def correlation_steps(steps: int) -> set[int]:
    """The steps of a run after which to save the correlation matrix.

    There are more of them at the beginning, when the matrix changes most.
    """
    return {round(fraction * (steps - 1)) for fraction in (0, 0.01, 0.03, 0.1, 0.3, 0.6, 1)}


@torch.no_grad()
def correlation_corner(a: Tensor, b: Tensor, dimensions: int = 64) -> Tensor:
    """The top left corner of the cross-correlation matrix C over the global batch.

    Args:
        a: Normalised embeddings of view a, [N, D].
        b: Normalised embeddings of view b, [N, D].
        dimensions: Number of rows and columns of the corner.

    Returns:
        [dimensions, dimensions], float16 on the CPU.
    """
    n = len(a) * world_size()
    corner = all_reduce_identity_grad(a[:, :dimensions].T @ b[:, :dimensions]) / n
    return corner.half().cpu()


def save_correlation(path: Path, output: BarlowTwinsOutput) -> None:
    """Save the `correlation_corner` of a step as a NumPy file."""
    np.save(path, correlation_corner(output.a, output.b).numpy())
