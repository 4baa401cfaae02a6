"""kNN classification, compared with brute force and with scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import evaluation.knn
from evaluation import (
    knn_accuracies,
    knn_accuracy,
    knn_votes,
    nearest_neighbours,
    pixel_feature,
)


def brute_force_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    k: int,
    temperature: float,
) -> dict[str, float]:
    ranks = []
    for query, label in zip(queries, labels, strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes: dict[int, float] = {}
        for i in np.argsort(-similarity)[:k]:
            vote = math.exp(similarity[i] / temperature)
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0) + vote
        ranked = sorted(votes, key=lambda name: -votes[name])
        ranks.append(ranked.index(label) if label in votes else 9)
    return {"top1": 100 * np.mean(np.array(ranks) < 1), "top5": 100 * np.mean(np.array(ranks) < 5)}


def clusters(n: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of seven classes around a centre each, with random lengths, which must not count."""
    rng = np.random.default_rng(seed)
    centres = 1 + np.random.default_rng(9).normal(0, 1, (7, 5))
    labels = rng.integers(0, 7, n)
    features = spread * rng.normal(0, 1, (n, 5)) + centres[labels]
    return features * rng.uniform(0.1, 10, (n, 1)), labels


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities of 96 queries at once, to a bank of 200 in float64."""
    monkeypatch.setattr(evaluation.knn, "_SIMILARITY_BYTES", 96 * 200 * 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("k", "spread"), [(20, 1.5), (1, 1.5), (20, 0.05), (500, 1.5)])
def test_accuracy_is_that_of_a_brute_force_vote(k: int, spread: float, temperature: float) -> None:
    """With more queries than one chunk; all of the bank votes if k is larger than it."""
    data = (*clusters(200, spread, 0), *clusters(1100, spread, 1))
    expected = brute_force_accuracy(*data, k, temperature)
    ours = knn_accuracy(*(torch.from_numpy(x) for x in data), k=k, temperature=temperature)
    assert ours == pytest.approx(expected, abs=1e-9)
    assert 20 < expected["top1"] <= expected["top5"] <= 100


@pytest.mark.usefixtures("small_chunks")
def test_nearest_neighbours_are_those_of_scikit_learn() -> None:
    bank, _ = clusters(200, 1.5, 0)
    queries, _ = clusters(300, 1.5, 1)
    similarities, positions = nearest_neighbours(
        torch.from_numpy(bank), torch.from_numpy(queries), 7
    )
    theirs = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(bank)
    their_distances, their_positions = theirs.kneighbors(queries)
    np.testing.assert_array_equal(positions, their_positions)
    np.testing.assert_allclose(similarities, 1 - their_distances, atol=1e-12)


def test_a_bank_smaller_than_k_returns_all_its_rows() -> None:
    _, positions = nearest_neighbours(torch.randn(3, 5), torch.randn(300, 5), 7)
    assert positions.shape == (300, 3)


def test_votes_are_shares() -> None:
    similarities = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.5, 0.3, 0.3, 0.1]], dtype=torch.float64)
    shares = knn_votes(similarities, torch.tensor([[2, 0, 2, 2], [1, 0, 0, 3]]), 5, temperature=0.2)
    first = torch.tensor([0.25, 0, 0.75, 0, 0], dtype=torch.float64)
    a, b, c = (math.exp(x) for x in (2.5, 1.5, 0.5))
    second = torch.tensor([2 * b, a, 0, c, 0], dtype=torch.float64) / (a + 2 * b + c)
    torch.testing.assert_close(shares, torch.stack((first, second)))


def test_votes_need_labels() -> None:
    with pytest.raises(AssertionError):
        knn_votes(torch.ones(1, 4), torch.tensor([[2, 0, -1, 2]]), 5)


def test_a_class_without_a_vote_is_never_a_prediction() -> None:
    bank, labels = torch.eye(6), torch.arange(6)
    accuracy = knn_accuracy(bank, labels, bank, (labels + 1) % 6, k=1)
    assert accuracy == {"top1": 0, "top5": 0}


def test_a_class_that_the_bank_lacks_is_never_a_prediction() -> None:
    bank, labels = torch.eye(6), torch.arange(6)
    assert knn_accuracy(bank, labels, bank, labels + 6, k=1)["top5"] == 0


def test_each_feature_of_batches_is_scored_in_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 3, 6, 6, generator=generator)
    batches = [((views,), torch.arange(4) % 2, torch.arange(4))] * 3
    features = {"pixels": pixel_feature, "constant": lambda view: torch.ones(len(view), 1)}
    # Iterators can be read only once.
    accuracies = knn_accuracies(iter(batches), iter(batches), features)
    assert list(accuracies) == ["pixels", "constant"]
    assert accuracies["pixels"] == 100, "each query is in the bank"
    assert accuracies["constant"] == 50
