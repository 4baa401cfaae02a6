"""Extraction of features from batches, and features that are computed from pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation import colour_feature, extract_features

FEATURES = {"pixels": lambda view: view, "mean": lambda view: view.mean((2, 3))}


def batches_of(views: torch.Tensor) -> list[tuple[tuple[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Ten views in batches of 4, 4 and 2, labelled by their positions."""
    parts = [torch.arange(first, last) for first, last in ((0, 4), (4, 8), (8, 10))]
    return [((views[part],), part, part) for part in parts]


def test_features_are_flat_float32_rows() -> None:
    views = torch.randn(10, 3, 4, 4, dtype=torch.float64)
    features, labels = extract_features(batches_of(views), FEATURES)
    torch.testing.assert_close(features["pixels"], views.flatten(1).float())
    torch.testing.assert_close(features["mean"], views.mean((2, 3)).float())
    assert labels.tolist() == list(range(10))


def test_features_are_written_into_memory_allocated_beforehand() -> None:
    batches = batches_of(torch.randn(10, 3, 4, 4))
    expected, _ = extract_features(batches, FEATURES)
    # Room for twelve images, two of which could not be read.
    features, labels = extract_features(iter(batches), FEATURES, rows=12)
    assert labels.tolist() == list(range(10))
    for name, columns in (("pixels", 48), ("mean", 3)):
        assert torch.equal(features[name], expected[name])
        assert features[name].untyped_storage().nbytes() == 12 * columns * 4, "nothing was copied"


def test_more_images_than_rows_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        extract_features(batches_of(torch.randn(10, 3, 4, 4)), FEATURES, rows=9)


def test_colour_feature_is_the_square_root_of_a_colour_histogram() -> None:
    view = torch.from_numpy(np.random.default_rng(0).uniform(-2.2, 2.7, (2, 3, 16, 16)))
    for image, feature in zip(view.numpy(), colour_feature(view).numpy(), strict=True):
        counts, _ = np.histogramdd(image.reshape(3, -1).T, bins=6, range=[(-2.2, 2.7)] * 3)
        np.testing.assert_allclose(feature, np.sqrt(counts.ravel() / 256), rtol=1e-12)


def test_black_white_and_values_beyond_fall_into_the_outer_bins() -> None:
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    black = (torch.zeros(3, 4, 4) - mean) / std
    white = (torch.ones(3, 4, 4) - mean) / std
    feature = colour_feature(torch.stack((black, white, black - 9, white + 9)))
    assert feature.nonzero().tolist() == [[0, 0], [1, 215], [2, 0], [3, 215]]
    assert feature.norm(dim=1).tolist() == [1, 1, 1, 1]
