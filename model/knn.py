"""What frozen features are worth: k nearest neighbours, and a linear classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Views = tuple[Tensor, ...]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # in evaluation mode a network that trains compiled would be compiled anew
def extract(
    batches: Iterable[tuple[Views, Tensor, Tensor]], features: dict[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Each feature of every image, [n, F] float32, and the labels [n], on the device of the batches, in one pass.

    `features` are functions of a view [B, 3, S, S]; a network among them is to be in evaluation mode.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in features}
    labels = []
    for (view, *_), label, _ in batches:
        for name, feature in features.items():
            found[name].append(feature(view).float().flatten(1))
        labels.append(label)
    if not labels:
        return {name: torch.empty(0, 0) for name in features}, torch.empty(0, dtype=torch.int64)
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in percent of a vote among the k most similar (cosine) of bank [n, F] for each of queries [m, F].

    A neighbour votes with exp(similarity / temperature), as in Wu et al. 2018 and DINO's evaluation.
    """
    bank, queries = F.normalize(bank), F.normalize(queries)
    classes = int(bank_labels.max()) + 1
    right = 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)))  # [1024, k]
        weight = ((similarity - 1) / temperature).exp()
        votes = weight.new_zeros(len(query), classes).scatter_add_(1, bank_labels[nearest], weight)
        right += int((votes.argmax(1) == label).sum())
    return 100 * right / len(queries)


def probe_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, decay: float = 1e-3, iterations: int = 100
) -> float:
    """Top-1 accuracy in percent on queries [m, F] of a linear classifier that was fitted to bank [n, F].

    Multinomial logistic regression on standardised features with an L2 penalty of `decay` / 2 per squared weight, a
    convex problem: L-BFGS from zero gives the same each time, and needs no learning rate.
    """
    mean, deviation = bank.mean(0), bank.std(0, correction=0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    weight = bank.new_zeros(int(bank_labels.max()) + 1, bank.shape[1] + 1, requires_grad=True)  # the last is the bias
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
    bank: Iterable[tuple[Views, Tensor, Tensor]],
    queries: Iterable[tuple[Views, Tensor, Tensor]],
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
        name: knn_accuracy(bank_features.pop(name), bank_labels, query_features.pop(name), labels) for name in features
    }


def online_accuracies(
    bank: Iterable[tuple[Views, Tensor, Tensor]],
    queries: Iterable[tuple[Views, Tensor, Tensor]],
    feature: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """`knn_top1` and `probe_top1` of one feature, in percent, as `knn_accuracies`: to be followed during training."""
    bank_features, bank_labels = extract(bank, {"": feature})
    query_features, labels = extract(queries, {"": feature})
    if not len(bank_labels) or not len(labels):
        return {}
    found = bank_features[""], bank_labels, query_features[""], labels
    return {"knn_top1": knn_accuracy(*found), "probe_top1": probe_accuracy(*found)}


def colour_feature(view: Tensor, bins: int = 6) -> Tensor:
    """Square roots of a joint colour histogram, [B, bins^3], of a normalised view [B, 3, S, S].

    Their cosine is the Bhattacharyya coefficient of the histograms. The bins span what ImageNet's mean and deviation
    make of black and white: -2.2 to 2.7.
    """
    level = ((view + 2.2) / 4.9 * bins).long().clamp_(0, bins - 1)  # [B, 3, S, S]
    colour = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)  # [B, S S]
    counts = view.new_zeros(len(view), bins**3).scatter_add_(1, colour, torch.ones_like(colour, dtype=view.dtype))
    return (counts / colour.shape[1]).sqrt()


def pixel_feature(view: Tensor) -> Tensor:
    """The normalised pixels, [B, 3 S S], of views above 48 pixels averaged down to those: 50,000 of 224 fill 30 GB."""
    return F.adaptive_avg_pool2d(view, min(48, view.shape[-1])).flatten(1)
