"""A linear classifier fitted to features in one call, and the tests of a run during training.

`linear_heads.py` trains classifiers by SGD as the published protocols do; the probe here is a
quick measure that needs no learning rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Batches, extract_features
from .knn import knn_accuracy


def probe_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    decay: float = 1e-3,
    iterations: int = 100,
) -> float:
    """The top-1 accuracy, in percent, of multinomial logistic regression on the features.

    The features are standardised, and the problem is convex: L-BFGS from zero always gives the
    same result.

    Args:
        bank: Features [n, F] that the classifier is fitted to.
        bank_labels: Their labels [n].
        queries: Features [m, F] to classify.
        labels: Their labels [m].
        decay: The L2 penalty is decay / 2 times the sum of the squared weights.
        iterations: The maximum number of L-BFGS iterations.
    """
    mean = bank.mean(0)
    deviation = bank.std(0, correction=0) + 1e-6
    bank = (bank - mean) / deviation
    queries = (queries - mean) / deviation

    classes = int(bank_labels.max()) + 1
    # The last column is the bias.
    parameters = bank.new_zeros(classes, bank.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([parameters], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        value = F.cross_entropy(F.linear(bank, weight, bias), bank_labels)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    predictions = F.linear(queries, parameters[:, :-1], parameters[:, -1]).argmax(1)
    return 100 * float((predictions == labels).float().mean())


def online_accuracies(
    bank: Batches,
    queries: Batches,
    feature: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """The accuracies of one feature to follow during training: `knn_top1` and `probe_top1`.

    Args:
        bank: Batches of labelled training images.
        queries: Batches of labelled images that are held out.
        feature: A function of a view [B, 3, S, S].

    Returns:
        Percentages; {} if there is no image in the bank or in the queries.
    """
    bank_features, bank_labels = extract_features(bank, {"": feature})
    query_features, labels = extract_features(queries, {"": feature})
    if len(bank_labels) == 0 or len(labels) == 0:
        return {}
    data = (bank_features[""], bank_labels, query_features[""], labels)
    return {"knn_top1": knn_accuracy(*data)["top1"], "probe_top1": probe_accuracy(*data)}
