"""Linear SVMs on frozen features, one for each class: the multi-label protocol of PASCAL VOC2007.

After VISSL (Goyal et al. 2019, "Scaling and Benchmarking Self-Supervised Visual Representation
Learning"). scikit-learn takes a second to import, so this module is imported only to fit SVMs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_validate
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
"""The values of C that cross-validation chooses from."""

_FOLDS = 3
_MAX_ITERATIONS = 2000

Targets = NDArray[np.int8]
"""1: the image shows the class; 0: it shows only difficult objects of the class; -1: it does not
show the class."""


class LabelledFeatures(NamedTuple):
    """The features and the targets of a set of images."""

    features: Tensor  # [n, F]
    targets: Targets  # [n, C]


class SvmResult(NamedTuple):
    """The result of `svm_map`: a value for each class, and their mean."""

    costs: list[float]  # the C that was chosen for each class
    average_precisions: list[float]  # percent
    mean_average_precision: float  # percent
    fits: int  # number of SVMs that were fitted
    not_converged: int  # number of these that reached the iteration limit, mostly for a large C


def svm_map(
    train: LabelledFeatures,
    test: LabelledFeatures,
    classes: Sequence[str],
    *,
    costs: Sequence[float] = COSTS,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SvmResult:
    """Fit an SVM for each class, and measure its average precision on the test images.

    Each class uses the C with the best mean average precision in three-fold cross-validation on
    the training images, then the SVM is fitted to all of them. Images with only difficult objects
    of a class are negatives in training, and are left out in testing.

    The 20 classes of VOC2007 at 2,048 features take one core from 25 minutes to an hour, depending
    on how many fits converge.

    Args:
        train: The training images.
        test: The test images.
        classes: The names of the C classes.
        costs: The values of C to choose from.
        jobs: The number of processes; the result does not depend on it.
        progress: Called with the number of cross-validations and final fits done, and in all.

    Raises:
        ValueError: A class has too few training images for the folds or no test image, or a
            feature is not finite.
    """
    _check_images_per_class(train.targets, test.targets, classes)
    features = _normalised(train.features)
    test_features = _normalised(test.features)
    labels = np.where(train.targets.T == 1, 1, -1)  # [C, n]
    counter = _FitCounter(len(classes) * (len(costs) + 1), progress)

    # Processes, since threads would share liblinear's random numbers. They import only
    # scikit-learn, because the functions they call belong to it.
    workers = Parallel(n_jobs=jobs, return_as="generator")
    with warnings.catch_warnings():
        # Fits that do not converge are counted instead.
        warnings.simplefilter("ignore", ConvergenceWarning)
        chosen = _choose_costs(workers, features, labels, costs, counter)
        precisions = []
        fitted_svms = _fit_all(workers, features, labels, chosen)
        for svm, targets in zip(fitted_svms, test.targets.T, strict=True):
            scores = svm.decision_function(test_features)
            precisions.append(100 * average_precision(targets, scores))
            counter.add([svm])

    return SvmResult(
        costs=chosen,
        average_precisions=precisions,
        mean_average_precision=float(np.mean(precisions)),
        fits=len(classes) * (_FOLDS * len(costs) + 1),
        not_converged=counter.not_converged,
    )


def average_precision(targets: Targets, scores: NDArray[np.float64]) -> float:
    """The area under the interpolated precision-recall curve, from 0 to 1.

    The precision at each recall is the best precision at that recall or a higher one. Images with
    equal scores are accepted together, so the result does not depend on the order of the images.

    Args:
        targets: [n]; images with target 0 are left out.
        scores: [n]
    """
    counted = targets != 0
    targets = targets[counted]
    scores = scores[counted]
    order = np.argsort(-scores)
    is_last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    last = np.flatnonzero(is_last_of_equals)
    hits = np.cumsum(targets[order] == 1)[last]
    precision = hits / (last + 1)
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall_steps = np.diff(hits / hits[-1], prepend=0)
    return float(recall_steps @ best_precision)


class _FitCounter:
    """Reports the progress, and counts the fits that have not converged."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.not_converged = 0
        self._done = 0
        self._total = total
        self._progress = progress

    def add(self, svms: Iterable[Any]) -> None:
        """Count one step of the work, in which these SVMs were fitted."""
        self.not_converged += sum(int(svm.n_iter_) >= _MAX_ITERATIONS for svm in svms)
        self._done += 1
        self._progress(self._done, self._total)


def _build_svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost,
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=_MAX_ITERATIONS,
        class_weight={1: 2, -1: 1},
        random_state=0,
    )


def _choose_costs(
    workers: Parallel,
    features: NDArray[np.float64],
    labels: NDArray[np.int_],
    costs: Sequence[float],
    counter: _FitCounter,
) -> list[float]:
    """The C of each class with the best cross-validated average precision; the lowest of equals."""
    validations = workers(
        delayed(cross_validate)(
            _build_svm(cost),
            features,
            class_labels,
            cv=_FOLDS,
            scoring="average_precision",
            return_estimator=True,
        )
        for class_labels in labels
        for cost in costs
    )
    scores = []
    for validation in validations:
        scores.append(validation["test_score"].mean())
        counter.add(validation["estimator"])
    best = np.reshape(scores, (len(labels), len(costs))).argmax(axis=1)  # [C]
    return [costs[i] for i in best]


def _fit_all(
    workers: Parallel,
    features: NDArray[np.float64],
    labels: NDArray[np.int_],
    costs: Sequence[float],
) -> Iterable[LinearSVC]:
    """The SVM of each class, fitted to all training images with the C of the class."""
    fitted: Iterable[LinearSVC] = workers(
        delayed(_build_svm(cost).fit)(features, class_labels)
        for cost, class_labels in zip(costs, labels, strict=True)
    )
    return fitted


def _normalised(features: Tensor) -> NDArray[np.float64]:
    numbers = features.double().cpu().numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(
            "the features are not all finite: check the weights, and the precision in which the "
            "features were computed"
        )
    lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
    return numbers / (lengths + 1e-5)  # VISSL's constant; an image may have no feature above 0


def _check_images_per_class(
    train_targets: Targets, test_targets: Targets, classes: Sequence[str]
) -> None:
    for name, train, test in zip(classes, train_targets.T, test_targets.T, strict=True):
        positives = int((train == 1).sum())
        negatives = len(train) - positives
        for count, verb in ((positives, "show"), (negatives, "do not show")):
            if count < _FOLDS:
                raise ValueError(
                    f"only {count} training images {verb} {name}: {_FOLDS}-fold cross-validation "
                    f"needs at least {_FOLDS}, so add some"
                )
        if not (test == 1).any():
            raise ValueError(
                f"no test image shows {name}: its average precision is undefined. Add one, or use "
                "other test images"
            )
