"""The linear probe, compared with another solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from evaluation import probe_accuracy

CLASSES = 4
DIMENSIONS = 6


def make_clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels of overlapping Gaussian clusters; one dimension has another scale."""
    labels = torch.arange(n) % CLASSES
    centres = 1.2 * torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    scales = torch.tensor([1, 1, 1, 50, 1, 1.0])
    return (centres[labels] + noise) * scales, labels


@pytest.mark.parametrize("decay", [1e-3, 0.1])
def test_the_probe_finds_the_minimum_that_another_solver_finds(decay: float) -> None:
    bank, bank_labels = make_clusters(120, seed=1)
    queries, labels = make_clusters(2000, seed=2)
    mean = bank.mean(0).numpy()
    deviation = bank.std(0, correction=0).numpy()

    def standardize(features: Tensor) -> np.ndarray:
        """With a column of ones for the bias."""
        x = (features.double().numpy() - mean) / deviation
        return np.hstack([x, np.ones((len(x), 1))])

    x = standardize(bank)

    def loss(flat_weight: np.ndarray) -> float:
        weight = flat_weight.reshape(CLASSES, DIMENSIONS + 1)
        logits = x @ weight.T
        picked = logits[np.arange(len(x)), bank_labels.numpy()]
        cross_entropy = np.mean(np.logaddexp.reduce(logits, axis=1) - picked)
        penalty = decay / 2 * (weight[:, :DIMENSIONS] ** 2).sum()
        return float(cross_entropy + penalty)

    start = np.zeros(CLASSES * (DIMENSIONS + 1))
    solution = minimize(loss, start, method="L-BFGS-B", options={"maxiter": 2000}).x
    weight = solution.reshape(CLASSES, DIMENSIONS + 1)
    predicted = (standardize(queries) @ weight.T).argmax(1)
    expected = 100 * float(np.mean(predicted == labels.numpy()))

    accuracy = probe_accuracy(bank, bank_labels, queries, labels, decay)
    assert accuracy == pytest.approx(expected, abs=0.3)
    assert accuracy > 40, "chance is 25"


def test_a_constant_feature_gives_chance_accuracy() -> None:
    labels = torch.arange(30) % 3
    features = torch.ones(30, 2)
    accuracy = probe_accuracy(features, labels, features, labels)
    assert accuracy == pytest.approx(100 / 3)
