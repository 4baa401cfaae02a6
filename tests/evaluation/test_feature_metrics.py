"""Effective rank, alignment and uniformity, compared with their definitions and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln, ive
from torch import Tensor

from evaluation import feature_alignment, feature_uniformity, rankme


def matrix_with_singular_values(values: list[float], rows: int) -> Tensor:
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(40, len(values), dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(
    ("values", "expected"),
    [([5.0, 5, 5], 3), ([7.0], 1), ([2.0, 1, 1], 2 * math.sqrt(2)), ([1.0] * 40, 40)],
)
@pytest.mark.parametrize("rows", [45, 400])
def test_rankme_of_known_singular_values(values: list[float], expected: float, rows: int) -> None:
    features = matrix_with_singular_values(values, rows)
    assert rankme(features) == pytest.approx(expected, rel=1e-5)


def test_rankme_is_the_formula_of_the_paper() -> None:
    """The features are neither centred nor normalised. The paper adds 1e-7, meant for float32."""
    features = (torch.randn(100, 30).abs() * torch.arange(1, 31)).numpy()
    p = np.linalg.svd(features, compute_uv=False)
    p = p / p.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-4)


def test_rankme_of_features_that_are_not_finite_is_nan() -> None:
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan], [1, 2]])))


def test_a_subset_of_the_rows_is_spread_over_all_classes() -> None:
    by_class = torch.eye(16).repeat_interleave(100, 0)
    assert rankme(by_class, rows=16) == pytest.approx(16)
    assert rankme(by_class[:16]) == pytest.approx(1)
    uniformity = feature_uniformity(by_class)
    assert feature_uniformity(by_class, rows=160) == pytest.approx(uniformity, abs=0.1)
    assert feature_uniformity(by_class[:100]) == 0


def unit_rows(x: Tensor) -> Tensor:
    return x.double() / x.double().norm(dim=1, keepdim=True)


def test_alignment_is_the_definition_of_wang_and_isola() -> None:
    x, y = (torch.randn(2500, 6) + 1 for _ in range(2))  # more rows than one block
    distances = (unit_rows(x) - unit_rows(y)).norm(p=2, dim=1)
    assert feature_alignment(x, y) == pytest.approx(float(distances.pow(2).mean()), rel=1e-12)


def test_uniformity_is_the_definition_of_wang_and_isola() -> None:
    x = torch.randn(2500, 6) + 1  # more rows than one block
    expected = torch.pdist(unit_rows(x), p=2).pow(2).mul(-2).exp().mean().log()
    assert feature_uniformity(x) == pytest.approx(float(expected), rel=1e-12)


def test_alignment_and_uniformity_at_their_bounds() -> None:
    x = torch.randn(20, 4)
    assert feature_alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert feature_alignment(x, -x) == pytest.approx(4)
    assert feature_uniformity(torch.ones(30, 5)) == pytest.approx(0, abs=1e-12)


def test_uniformity_of_random_directions() -> None:
    """The closed form is E exp(4 cos - 4) on the sphere in d dimensions.

    It follows from the normalisation of the von Mises-Fisher distribution.
    """
    d, kappa = 8, 4.0
    order = d / 2 - 1
    expected = (
        gammaln(d / 2) + order * math.log(2 / kappa) + math.log(ive(order, kappa)) + kappa - 4
    )
    x = torch.randn(3000, d, generator=torch.Generator().manual_seed(0))
    assert feature_uniformity(x) == pytest.approx(expected, abs=0.01)
    assert expected == pytest.approx(-3.09, abs=0.3)
