"""What frozen features are worth: k nearest neighbours, and a linear classifier that is fitted to them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Batches, extract, right

_MOST_BYTES = 1 << 29  # of similarities at a time; finding the highest of them takes as much again


@torch.no_grad()
def neighbours(bank: Tensor, queries: Tensor, k: int = 20) -> tuple[Tensor, Tensor]:
    """The k most similar (cosine) rows of bank [n, F] to each of queries [m, F], the most similar first.

    Their similarities [m, k] and their positions in the bank [m, k], int64; all of it where k is above n.
    """
    queries, k = F.normalize(queries), min(k, len(bank))
    lengths = bank.norm(dim=1).clamp(
        min=1e-12
    )  # the products are divided, not the bank: a copy would be as large
    similarity = queries.new_empty(len(queries), k)
    position = torch.empty_like(similarity, dtype=torch.int64)
    rows = max(1, _MOST_BYTES // (len(bank) * bank.element_size()))
    for first in range(0, len(queries), rows):
        part = slice(first, first + rows)
        torch.topk(
            (queries[part] @ bank.T).div_(lengths), k, out=(similarity[part], position[part])
        )
    return similarity, position


def knn_votes(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07
) -> Tensor:
    """The share of each class in a vote, [m, classes]: of neighbours with similarity [m, k] and labels [m, k].

    A neighbour votes with exp(similarity / temperature), as in Wu et al. 2018 and DINO's evaluation.
    """
    assert int(labels.min()) >= 0
    weight = (similarity / temperature).softmax(1)
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """`top1` and `top5` in percent of that vote among bank [n, F], labelled [n], for queries [m, F], labelled [m]."""
    classes = int(bank_labels.max()) + 1
    similarity, position = neighbours(bank, queries, k)
    found = torch.zeros(2, dtype=torch.int64, device=bank.device)
    for similar, nearest, label in zip(
        similarity.split(4096), position.split(4096), labels.split(4096), strict=True
    ):
        voters = bank_labels[nearest]
        votes = knn_votes(similar, voters, classes, temperature)
        named = (voters == label[:, None]).any(
            1
        )  # without this, the first of five could be classes without a vote
        found += right(votes[named], label[named])
    top1, top5 = found.tolist()
    return {"top1": 100 * top1 / len(queries), "top5": 100 * top5 / len(queries)}


def probe_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    decay: float = 1e-3,
    iterations: int = 100,
) -> float:
    """Top-1 accuracy in percent on queries [m, F] of a linear classifier that was fitted to bank [n, F].

    Multinomial logistic regression on standardised features with an L2 penalty of `decay` / 2 per squared weight, a
    convex problem: L-BFGS from zero gives the same each time, and needs no learning rate.
    """
    mean, deviation = bank.mean(0), bank.std(0, correction=0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    weight = bank.new_zeros(
        int(bank_labels.max()) + 1, bank.shape[1] + 1, requires_grad=True
    )  # the last is the bias
    solver = torch.optim.LBFGS([weight], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(bank, weight[:, :-1], weight[:, -1]), bank_labels)
        value = value + decay / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    found = F.linear(queries, weight[:, :-1], weight[:, -1]).argmax(1)
    return 100 * float((found == labels).float().mean())


def knn_accuracies(
    bank: Batches,
    queries: Batches,
    features: dict[str, Callable[[Tensor], Tensor]],
) -> dict[str, float]:
    """The kNN accuracy of each feature, in percent, from batches of labelled images; each image is decoded once.

    {} where there is no image to ask or to be asked about.
    """
    bank_features, bank_labels = extract(bank, features)
    query_features, labels = extract(queries, features)
    if not len(bank_labels) or not len(labels):
        return {}
    return {
        name: knn_accuracy(bank_features.pop(name), bank_labels, query_features.pop(name), labels)[
            "top1"
        ]
        for name in features
    }


def online_accuracies(
    bank: Batches,
    queries: Batches,
    feature: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """`knn_top1` and `probe_top1` of one feature, in percent, as `knn_accuracies`: to be followed during training."""
    bank_features, bank_labels = extract(bank, {"": feature})
    query_features, labels = extract(queries, {"": feature})
    if not len(bank_labels) or not len(labels):
        return {}
    found = bank_features[""], bank_labels, query_features[""], labels
    return {"knn_top1": knn_accuracy(*found)["top1"], "probe_top1": probe_accuracy(*found)}
