"""Frozen features by linear SVMs, a class against the rest: the multi-label protocol of PASCAL VOC 2007.

As VISSL does it (Goyal et al. 2019, "Scaling and Benchmarking Self-Supervised Visual Representation Learning").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
_FOLDS = 3
_MOST_ITERATIONS = 2000

Targets = NDArray[
    np.int8
]  # 1 for pictures with the class, 0 for those with difficult objects of it alone, -1 without


class SvmResult(NamedTuple):
    """What `svm_map` finds, per class and as their mean."""

    costs: list[float]  # the C of each class
    average_precisions: list[float]  # percent
    mean_average_precision: float  # percent
    fits: int  # of SVMs, in all
    not_converged: int  # of these fits; those of a large C, mostly


def svm_map(
    train: Tensor,
    train_targets: Targets,
    test: Tensor,
    test_targets: Targets,
    classes: Sequence[str],
    *,
    costs: Sequence[float] = COSTS,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SvmResult:
    """The average precision of each class on `test` [m, F] of an SVM that was fitted to `train` [n, F].

    Its C is that of `costs` with the best mean average precision in three-fold cross-validation on `train`. Difficult
    pictures are negatives in training and left out in testing. `jobs` processes fit; how many changes nothing. The 20
    classes of VOC07 at 2,048 features take one core from 25 minutes to an hour, by how many fits converge.

    ValueError where a class has too few pictures for the folds, or none to be tested on, and for features that are not
    finite.
    """
    from sklearn.exceptions import ConvergenceWarning  # here, for it takes a second
    from sklearn.model_selection import cross_validate
    from sklearn.svm import LinearSVC
    from sklearn.utils.parallel import Parallel, delayed

    def svm(cost: float) -> Any:
        return LinearSVC(
            C=cost,
            penalty="l2",
            loss="squared_hinge",
            dual=True,
            tol=1e-4,
            max_iter=_MOST_ITERATIONS,
            class_weight={1: 2, -1: 1},
            random_state=0,
        )

    _check(train_targets, test_targets, classes)
    features, test_features = _normalised(train), _normalised(test)
    labels = np.where(train_targets.T == 1, 1, -1)  # [C, n]
    total, done, not_converged = len(classes) * (len(costs) + 1), 0, 0

    def finished(fitted: Sequence[Any]) -> None:
        nonlocal done, not_converged
        done, not_converged = (
            done + 1,
            not_converged + sum(int(one.n_iter_) >= _MOST_ITERATIONS for one in fitted),
        )
        progress(done, total)

    # Processes, as threads would share liblinear's random numbers; they import scikit-learn alone, for what they are
    # told to call is its own.
    workers = Parallel(n_jobs=jobs, return_as="generator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # experiment.counted instead
        validations = workers(
            delayed(cross_validate)(
                svm(cost),
                features,
                own,
                cv=_FOLDS,
                scoring="average_precision",
                return_estimator=True,
            )
            for own in labels
            for cost in costs
        )
        scores = []
        for validation in validations:
            scores.append(validation["test_score"].mean())
            finished(validation["estimator"])
        best = np.reshape(scores, (len(classes), len(costs))).argmax(
            axis=1
        )  # [C], the smallest C of equals
        fits = workers(
            delayed(svm(costs[i]).fit)(features, own) for i, own in zip(best, labels, strict=True)
        )
        precisions = []
        for fitted, own in zip(fits, test_targets.T, strict=True):
            precisions.append(100 * average_precision(own, fitted.decision_function(test_features)))
            finished([fitted])
    fits_made = len(classes) * (_FOLDS * len(costs) + 1)
    return SvmResult(
        [costs[i] for i in best], precisions, float(np.mean(precisions)), fits_made, not_converged
    )


def average_precision(targets: Targets, scores: NDArray[np.float64]) -> float:
    """The area under the interpolated precision-recall curve, of 1, for targets [n] and scores [n]; 0 is left out.

    Each recall has the best precision at that recall or a higher one. Equal scores are accepted together: the result
    does not depend on the order of the samples.
    """
    targets, scores = targets[targets != 0], scores[targets != 0]
    order = np.argsort(-scores)
    last = np.flatnonzero(
        np.append(np.diff(scores[order]) != 0, True)
    )  # of each group of equal scores
    hits = np.cumsum(targets[order] == 1)[last]
    precision = np.maximum.accumulate((hits / (last + 1))[::-1])[::-1]
    return float(np.diff(hits / hits[-1], prepend=0) @ precision)


def _normalised(features: Tensor) -> NDArray[np.float64]:
    numbers = features.double().cpu().numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(
            "the features are not all finite: the weights, or the precision they were computed in, are bad"
        )
    return numbers / (
        np.linalg.norm(numbers, axis=1, keepdims=True) + 1e-5
    )  # VISSL's; an image may have none


def _check(train_targets: Targets, test_targets: Targets, classes: Sequence[str]) -> None:
    for name, train, test in zip(classes, train_targets.T, test_targets.T, strict=True):
        for what, count in (
            ("with", int((train == 1).sum())),
            ("without", int((train != 1).sum())),
        ):
            if count < _FOLDS:
                raise ValueError(
                    f"{count} training pictures are {what} {name}: {_FOLDS} folds need {_FOLDS}, add some"
                )
        if not (test == 1).any():
            raise ValueError(
                f"no test picture has {name}: its average precision is undefined. Add one, or test others"
            )
