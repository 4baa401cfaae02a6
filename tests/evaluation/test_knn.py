"""kNN beside brute force and scikit-learn, what is extracted, and readings of features beside their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln, ive
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import evaluation.features
import evaluation.knn
from evaluation import (
    colour_feature,
    effective_rank,
    extract,
    feature_alignment,
    feature_uniformity,
    knn_accuracies,
    knn_accuracy,
    knn_votes,
    neighbours,
    pixel_feature,
)


def brute_force(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    truth: np.ndarray,
    k: int,
    temperature: float,
) -> dict[str, float]:
    ranks = []
    for query, label in zip(queries, truth, strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes: dict[int, float] = {}
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] = votes.get(labels[i], 0) + math.exp(similarity[i] / temperature)
        ranked = sorted(votes, key=lambda name: -votes[name])
        ranks.append(ranked.index(label) if label in votes else 9)
    return {"top1": 100 * np.mean(np.array(ranks) < 1), "top5": 100 * np.mean(np.array(ranks) < 5)}


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities to a bank of 200 for 96 queries in float64."""
    monkeypatch.setattr(evaluation.knn, "_MOST_BYTES", 96 * 200 * 8)


def clusters(n: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels, centres = rng.integers(0, 7, n), 1 + np.random.default_rng(9).normal(0, 1, (7, 5))
    features = spread * rng.normal(0, 1, (n, 5)) + centres[labels]
    return features * rng.uniform(0.1, 10, (n, 1)), labels  # lengths do not count


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("k", "spread"), [(20, 1.5), (1, 1.5), (20, 0.05), (500, 1.5)])
def test_knn_is_a_vote_of_the_most_similar(k: int, spread: float, temperature: float) -> None:
    """More queries than one chunk; k above the size of the bank means all of it."""
    data = (*clusters(200, spread, 0), *clusters(1100, spread, 1))
    expected = brute_force(*data, k, temperature)
    ours = knn_accuracy(*(torch.from_numpy(x) for x in data), k=k, temperature=temperature)
    assert ours == pytest.approx(expected, abs=1e-9)
    assert 20 < expected["top1"] <= expected["top5"] <= 100


@pytest.mark.usefixtures("few_at_a_time")
def test_neighbours_are_those_of_scikit_learn() -> None:
    bank, queries = clusters(200, 1.5, 0)[0], clusters(300, 1.5, 1)[0]
    similarity, position = neighbours(torch.from_numpy(bank), torch.from_numpy(queries), 7)
    theirs = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(bank)
    distance, index = theirs.kneighbors(queries)
    np.testing.assert_array_equal(position, index)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-12)
    assert neighbours(torch.from_numpy(bank[:3]), torch.from_numpy(queries), 7)[1].shape == (300, 3)


def test_votes_are_shares() -> None:
    similarity = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.5, 0.3, 0.3, 0.1]], dtype=torch.float64)
    shares = knn_votes(similarity, torch.tensor([[2, 0, 2, 2], [1, 0, 0, 3]]), 5, temperature=0.2)
    a, b, c = (math.exp(x) for x in (2.5, 1.5, 0.5))
    second = torch.tensor([2 * b, a, 0, c, 0], dtype=torch.float64) / (a + 2 * b + c)
    torch.testing.assert_close(
        shares, torch.stack((torch.tensor([0.25, 0, 0.75, 0, 0]).double(), second))
    )
    with pytest.raises(AssertionError):
        knn_votes(similarity, torch.tensor([[2, 0, -1, 2], [1, 0, 0, 3]]), 5)


def test_a_class_without_a_vote_is_no_guess() -> None:
    bank, labels = torch.eye(6), torch.arange(6)
    found = knn_accuracy(bank, labels, bank, (labels + 1) % 6, k=1)
    assert found == {"top1": 0, "top5": 0}
    assert knn_accuracy(bank, labels, bank, labels + 6, k=1)["top5"] == 0, (
        "nor is one that the bank lacks"
    )


def test_extracted_features_go_to_the_place_that_was_taken_for_them() -> None:
    views = torch.randn(10, 3, 4, 4, dtype=torch.float64)
    batches = [
        ((views[a:b],), torch.arange(a, b), torch.arange(a, b))
        for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    features = {"pixels": lambda view: view, "mean": lambda view: view.mean((2, 3))}
    loose, labels = extract(batches, features)
    placed, same_labels = extract(
        iter(batches), features, rows=12
    )  # of 12, two turned out to be bad
    torch.testing.assert_close(loose["pixels"], views.flatten(1).float())
    assert labels.tolist() == same_labels.tolist() == list(range(10))
    for name, columns in (("pixels", 48), ("mean", 3)):
        assert torch.equal(loose[name], placed[name])
        assert placed[name].untyped_storage().nbytes() == 12 * columns * 4, "nothing was copied"
    with pytest.raises(RuntimeError, match="must match"):
        extract(batches, features, rows=9)


def test_knn_scores_each_feature_of_batches_in_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        ((torch.randn(4, 3, 6, 6, generator=generator),), torch.arange(4) % 2, torch.arange(4))
    ] * 3
    features = {"pixels": pixel_feature, "none": lambda view: torch.ones(len(view), 1)}
    scores = knn_accuracies(iter(batches), iter(batches), features)
    assert list(scores) == ["pixels", "none"]
    assert scores["pixels"] == 100, "each query is in the bank"
    assert scores["none"] == 50


def test_colour_feature_is_the_square_root_of_a_colour_histogram() -> None:
    view = torch.from_numpy(np.random.default_rng(0).uniform(-2.2, 2.7, (2, 3, 16, 16)))
    for image, feature in zip(view.numpy(), colour_feature(view).numpy(), strict=True):
        counts, _ = np.histogramdd(image.reshape(3, -1).T, bins=6, range=[(-2.2, 2.7)] * 3)
        np.testing.assert_allclose(feature, np.sqrt(counts.ravel() / 256), rtol=1e-12)


def test_colour_feature_counts_black_white_and_what_lies_beyond() -> None:
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    black, white = ((torch.full((3, 4, 4), x) - mean) / std for x in (0.0, 1.0))
    feature = colour_feature(torch.stack((black, white, black - 9, white + 9)))
    assert feature.nonzero().tolist() == [[0, 0], [1, 215], [2, 0], [3, 215]]
    assert feature.norm(dim=1).tolist() == [1, 1, 1, 1]


# ── readings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_singular_values(values: list[float], rows: int) -> Tensor:
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (rows, 40)
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(
    ("values", "expected"),
    [([5.0, 5, 5], 3), ([7.0], 1), ([2.0, 1, 1], 2 * math.sqrt(2)), ([1.0] * 40, 40)],
)
@pytest.mark.parametrize("rows", [45, 400])
def test_effective_rank_of_known_singular_values(
    values: list[float], expected: float, rows: int
) -> None:
    assert effective_rank(with_singular_values(values, rows)) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_is_rankme() -> None:
    """Lengths and the mean count; RankMe's own 1e-7, meant for float32, is the difference."""
    x = (torch.randn(100, 30).abs() * torch.arange(1, 31)).numpy()
    p = np.linalg.svd(x, compute_uv=False)
    p = p / p.sum() + 1e-7
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(
        np.exp(-(p * np.log(p)).sum()), rel=1e-4
    )


def test_a_part_of_the_rows_is_spread_over_all() -> None:
    by_class = torch.eye(16).repeat_interleave(100, 0)
    assert effective_rank(by_class, rows=16) == pytest.approx(16)
    assert effective_rank(by_class[:16]) == pytest.approx(1)
    whole, part = feature_uniformity(by_class), feature_uniformity(by_class, rows=160)
    assert part == pytest.approx(whole, abs=0.1)
    assert feature_uniformity(by_class[:100]) == 0


def test_effective_rank_of_what_is_not_finite_is_nan() -> None:
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [1, 2]])))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.features, "_BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
def test_alignment_and_uniformity_are_wang_and_isolas() -> None:
    x, y = (torch.randn(50, 6) + 1 for _ in range(2))
    a, b = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))
    assert feature_alignment(x, y) == pytest.approx(
        float((a - b).norm(p=2, dim=1).pow(2).mean()), rel=1e-12
    )
    uniformity = torch.pdist(a, p=2).pow(2).mul(-2).exp().mean().log()
    assert feature_uniformity(x) == pytest.approx(float(uniformity), rel=1e-12)


def test_alignment_and_uniformity_at_their_ends() -> None:
    x = torch.randn(20, 4)
    assert feature_alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert feature_alignment(x, -x) == pytest.approx(4)
    assert feature_uniformity(torch.ones(30, 5)) == pytest.approx(0, abs=1e-12)


def test_uniformity_of_directions_at_random() -> None:
    """E exp(4 cos - 4) on the sphere in d dimensions, by the normalisation of the von Mises-Fisher distribution."""
    d, kappa = 8, 4.0
    order = d / 2 - 1
    expected = (
        gammaln(d / 2) + order * math.log(2 / kappa) + math.log(ive(order, kappa)) + kappa - 4
    )
    x = torch.randn(3000, d, generator=torch.Generator().manual_seed(0))
    assert feature_uniformity(x) == pytest.approx(expected, abs=0.01)
    assert expected == pytest.approx(-3.09, abs=0.3)
