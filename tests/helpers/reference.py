"""The formulas of the paper written out, as references for the tests of model/."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LarsSettings(NamedTuple):
    weight_decay: float
    eta: float
    momentum: float
    clip: bool = False


def lars_step(
    p: Tensor, g: Tensor, mu: Tensor, lr: float, settings: LarsSettings
) -> tuple[Tensor, Tensor]:
    """The new parameter and momentum by LARS (section 1 of the paper's appendix).

    With `clip`, by solo-learn's variant, which limits the factor on the gradient.
    """
    if p.ndim > 1:
        g = g + settings.weight_decay * p
        if p.norm() > 0 and g.norm() > 0:
            factor = settings.eta * float(p.norm()) / float(g.norm())
            if settings.clip:
                factor = min(factor / lr if lr else math.inf, 1.0)
            g = g * factor
    mu = settings.momentum * mu + g
    return p - lr * mu, mu


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """C = bn(z_a)^T bn(z_b) / N of embeddings [N, D], with the biased variance."""

    def batch_norm(z: Tensor) -> Tensor:
        centered = z - z.mean(0)
        variance = (centered**2).mean(0)
        return centered / (variance + 1e-5).sqrt()

    return torch.einsum("ni,nj->ij", batch_norm(z_a), batch_norm(z_b)) / len(z_a)
