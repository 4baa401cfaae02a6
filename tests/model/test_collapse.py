"""Readings of features compared with their definitions, and warnings of a collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model import CollapseMonitor, correlation_corner, feature_readings, normalize


def test_feature_readings_follow_their_definitions() -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).abs()
    readings = feature_readings(x)
    directions = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    deviation = np.sqrt(directions.var(axis=0).sum())
    share = np.linalg.svd(directions, compute_uv=False)
    share /= share.sum()
    rank = np.exp(-(share * np.log(share)).sum())
    assert readings["feature_deviation"] == pytest.approx(deviation, rel=1e-5)
    assert readings["effective_rank"] == pytest.approx(rank, rel=1e-4)


def test_equal_features_have_deviation_0_and_rank_1() -> None:
    readings = feature_readings(torch.ones(64, 16))
    assert readings["feature_deviation"] == pytest.approx(0, abs=1e-3)
    assert readings["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_orthogonal_features_use_all_dimensions() -> None:
    readings = feature_readings(torch.eye(16).repeat(4, 1))
    assert readings["feature_deviation"] == pytest.approx(math.sqrt(15 / 16))
    assert readings["effective_rank"] == pytest.approx(16, rel=1e-4)


def test_readings_of_nan_features_are_nan() -> None:
    readings = feature_readings(torch.full((8, 4), torch.nan))
    assert all(math.isnan(value) for value in readings.values())


def test_the_correlation_corner_is_a_part_of_the_correlation_matrix() -> None:
    a, b = (
        normalize(torch.randn(50, 9, generator=torch.Generator().manual_seed(seed)))
        for seed in range(2)
    )
    corner = correlation_corner(a, b, 5)
    expected = np.corrcoef(a.T.numpy(), b.T.numpy())[:9, 9:][:5, :5]
    assert corner.dtype == torch.float16
    np.testing.assert_allclose(corner.numpy(), expected, atol=2e-3)


def make_readings(deviation: float, rank: float) -> dict[str, float]:
    return {"feature_deviation": deviation, "effective_rank": rank}


def test_a_collapse_is_reported_once_and_again_after_a_recovery() -> None:
    monitor = CollapseMonitor()
    for deviation in (0.2, 0.6, 0.3, 0.07):
        assert monitor.warning(make_readings(deviation, 40)) is None
    warning = monitor.warning(make_readings(0.05, 40))
    assert warning is not None
    assert "possible collapse: the feature deviation fell from 0.6 to 0.05;" in warning
    assert "effective rank" not in warning
    assert monitor.warning(make_readings(0.01, 40)) is None, "it has been reported"

    assert monitor.warning(make_readings(0.4, 40)) is None, "it has recovered"
    warning = monitor.warning(make_readings(0.02, 2))
    assert warning is not None
    assert "feature deviation fell from 0.6 to 0.02 and" in warning
    assert "the effective rank fell from 40 to 2;" in warning


def test_a_resumed_run_remembers_the_highest_readings() -> None:
    monitor = CollapseMonitor(make_readings(0.6, 40))
    assert "effective rank fell from 40 to 3;" in str(monitor.warning(make_readings(0.5, 3)))


def test_nan_does_not_count_as_a_reading() -> None:
    monitor = CollapseMonitor(make_readings(0.6, 40))
    monitor.warning(make_readings(math.nan, math.nan))
    assert monitor.highest == make_readings(0.6, 40)
