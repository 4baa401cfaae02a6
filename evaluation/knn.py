"""k-nearest-neighbour classification of features by cosine similarity.

The bank holds the features of labelled training images; the queries are classified by a weighted
vote of their nearest neighbours in the bank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Batches, count_correct, extract_features

# Bytes of similarities that are computed at once. torch.topk needs as many again.
_SIMILARITY_BYTES = 1 << 29
_QUERIES_AT_ONCE = 4096


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, k: int = 20) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` most similar (by cosine) to each query, most similar first.

    Args:
        bank: Features [n, F].
        queries: Features [m, F].
        k: The number of neighbours; all rows are returned if the bank has fewer.

    Returns:
        Their similarities [m, k] and their positions in the bank, int64 [m, k].
    """
    k = min(k, len(bank))
    queries = F.normalize(queries)
    # The products are divided by these lengths; a normalised copy of the bank would double it.
    lengths = bank.norm(dim=1).clamp(min=1e-12)  # [n]
    similarities = queries.new_empty(len(queries), k)
    positions = torch.empty_like(similarities, dtype=torch.int64)
    rows = max(1, _SIMILARITY_BYTES // (len(bank) * bank.element_size()))
    for first in range(0, len(queries), rows):
        part = slice(first, first + rows)
        cosine = (queries[part] @ bank.T).div_(lengths)  # [rows, n]
        torch.topk(cosine, k, out=(similarities[part], positions[part]))
    return similarities, positions


def knn_votes(
    similarities: Tensor, labels: Tensor, classes: int, temperature: float = 0.07
) -> Tensor:
    """The share of each class in the vote of the neighbours, [m, classes].

    A neighbour votes with weight exp(similarity / temperature), as in Wu et al. 2018 and in DINO's
    evaluation.

    Args:
        similarities: Similarities of the neighbours [m, k].
        labels: Labels of the neighbours [m, k].
        classes: The number of classes.
        temperature: A lower one gives more weight to the nearest.
    """
    assert int(labels.min()) >= 0
    weights = (similarities / temperature).softmax(1)
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """The `top1` and `top5` accuracy of kNN classification, in percent.

    Args:
        bank: Features [n, F] of the images that vote.
        bank_labels: Their labels [n].
        queries: Features [m, F] of the images to classify.
        labels: Their labels [m].
        k: The number of neighbours that vote.
        temperature: See `knn_votes`.
    """
    classes = int(bank_labels.max()) + 1
    similarities, positions = nearest_neighbours(bank, queries, k)
    correct = torch.zeros(2, dtype=torch.int64, device=bank.device)
    for part_similarities, part_positions, part_labels in zip(
        similarities.split(_QUERIES_AT_ONCE),
        positions.split(_QUERIES_AT_ONCE),
        labels.split(_QUERIES_AT_ONCE),
        strict=True,
    ):
        neighbour_labels = bank_labels[part_positions]  # [part, k]
        votes = knn_votes(part_similarities, neighbour_labels, classes, temperature)
        # A class without a vote is never a prediction, although it may be among the top five.
        has_vote = (neighbour_labels == part_labels[:, None]).any(1)
        correct += count_correct(votes[has_vote], part_labels[has_vote])
    top1, top5 = correct.tolist()
    return {"top1": 100 * top1 / len(queries), "top5": 100 * top5 / len(queries)}


def knn_accuracies(
    bank: Batches,
    queries: Batches,
    features: dict[str, Callable[[Tensor], Tensor]],
) -> dict[str, float]:
    """The kNN top-1 accuracy of several features, in percent; each image is decoded once.

    Args:
        bank: Batches of the labelled images that vote.
        queries: Batches of the labelled images to classify.
        features: Functions of a view [B, 3, S, S].

    Returns:
        The accuracy of each feature; {} if there is no image in the bank or in the queries.
    """
    bank_features, bank_labels = extract_features(bank, features)
    query_features, labels = extract_features(queries, features)
    if len(bank_labels) == 0 or len(labels) == 0:
        return {}
    accuracies = {}
    for name in features:
        # `pop` frees the memory of a feature once it is evaluated.
        accuracy = knn_accuracy(
            bank_features.pop(name), bank_labels, query_features.pop(name), labels
        )
        accuracies[name] = accuracy["top1"]
    return accuracies
