"""SVMs on frozen features: average precision by hand and by brute force, fits by scikit-learn."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from evaluation import LabelledFeatures, average_precision, svm_map

# --- Average precision ----------------------------------------------------------------------------


def precision_of(targets: list[int], scores: list[float]) -> float:
    return average_precision(np.array(targets, dtype=np.int8), np.array(scores, dtype=np.float64))


def test_average_precision_of_a_case_computed_by_hand() -> None:
    """In order of score: + - + + - -, with a difficult image in between.

    The precision at each hit is 1, 2/3, 3/4, and the second is raised to the third. Each hit is a
    third of the recall: (1 + 3/4 + 3/4) / 3.
    """
    targets = [-1, 1, 1, 0, -1, 1, -1]
    scores = [0.8, 0.7, 0.9, 0.75, 0.1, 0.5, 0.2]
    assert precision_of(targets, scores) == pytest.approx(2.5 / 3)


@pytest.mark.parametrize(
    ("targets", "scores", "expected"),
    [
        ([1, 1, -1], [3, 2, 1], 1.0),
        ([-1, -1, 1], [3, 2, 1], 1 / 3),
        # All are accepted at once: the fraction of positives.
        ([1, -1, -1, -1], [5, 5, 5, 5], 1 / 4),
        # The second and third are accepted together, and one of them is wrong.
        ([1, -1, 1, -1], [2, 1, 1, 0], 1 / 2 + 1 / 2 * 2 / 3),
        ([0, 0, 1], [3, 2, 1], 1.0),
    ],
)
def test_average_precision_of_corner_cases(
    targets: list[int], scores: list[float], expected: float
) -> None:
    assert precision_of(targets, scores) == pytest.approx(expected)
    assert precision_of(targets[::-1], scores[::-1]) == pytest.approx(expected)


def interpolated_area(targets: NDArray[np.int8], scores: NDArray[np.float64]) -> float:
    """The area under the best precision at each recall, over every threshold."""
    counted = targets != 0
    points = []
    for threshold in np.unique(scores):
        accepted = counted & (scores >= threshold)
        if accepted.any():
            hits = int((targets[accepted] == 1).sum())
            points.append((hits / int((targets == 1).sum()), hits / int(accepted.sum())))
    recalls = sorted({0.0, *(recall for recall, _ in points)})
    return sum(
        (recall - before) * max(p for r, p in points if r >= recall)
        for before, recall in pairwise(recalls)
    )


def test_average_precision_is_the_area_under_the_interpolated_curve() -> None:
    """By brute force; scikit-learn's is not interpolated, and is never larger."""
    rng = np.random.default_rng(0)
    larger = 0
    for case in range(200):
        n = int(rng.integers(3, 40))
        targets = rng.choice(np.array([-1, -1, 0, 1], dtype=np.int8), n)
        targets[rng.integers(n)] = 1
        scores = rng.integers(0, 10, n).astype(float) if case % 2 else rng.normal(size=n)
        ours = average_precision(targets, scores)
        assert ours == pytest.approx(interpolated_area(targets, scores))

        counted = targets != 0
        plain = average_precision_score(targets[counted] == 1, scores[counted])
        assert ours >= plain - 1e-12
        larger += ours > plain + 1e-9
    assert larger > 50


# --- The protocol ---------------------------------------------------------------------------------

COSTS = (0.001, 0.1, 5.0)
CLASSES = ["ant", "bee", "cat"]


def random_data(n: int, seed: int, width: int = 24) -> LabelledFeatures:
    """Features that depend on three classes; one image in twelve is difficult."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 3))
    signal = causes @ np.random.default_rng(9).normal(size=(3, width))
    features = signal + 2.5 * rng.normal(size=(n, width))
    targets = np.where(causes > 0.6, 1, -1)
    targets[rng.random((n, 3)) < 1 / 12] = 0
    features *= rng.uniform(0.1, 10, (n, 1))
    return LabelledFeatures(torch.from_numpy(features).float(), targets.astype(np.int8))


def test_results_are_those_of_scikit_learns_grid_search() -> None:
    train, test = random_data(150, 0), random_data(120, 1)
    progress: list[tuple[int, int]] = []

    def note_progress(done: int, total: int) -> None:
        progress.append((done, total))

    result = svm_map(train, test, CLASSES, costs=COSTS, progress=note_progress)
    assert progress == [(i + 1, 12) for i in range(12)]

    def normalised(features: torch.Tensor) -> NDArray[np.float64]:
        numbers = features.double().numpy()
        return numbers / np.linalg.norm(numbers, axis=1)[:, None]

    for c in range(3):
        svc = LinearSVC(
            class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=0
        )
        search = GridSearchCV(svc, {"C": COSTS}, cv=3, scoring="average_precision")
        search.fit(normalised(train.features), np.where(train.targets[:, c] > 0, 1, -1))
        assert result.costs[c] == search.best_params_["C"]
        counted = test.targets[:, c] != 0
        scores = search.decision_function(normalised(test.features))
        expected = average_precision(test.targets[counted, c], scores[counted])
        # Ours adds 1e-5 to the norm.
        assert result.average_precisions[c] == pytest.approx(100 * expected, abs=0.3)
    assert len(set(result.costs)) > 1, "else the choice would not be tested"
    assert result.mean_average_precision == pytest.approx(np.mean(result.average_precisions))
    assert (result.fits, result.not_converged) == (30, 0)


def test_difficult_images_are_negatives_in_training() -> None:
    train, test = random_data(90, 0), random_data(90, 1)

    def result_with(difficult: int) -> Any:
        targets = np.where(train.targets == 0, difficult, train.targets)
        return svm_map(train._replace(targets=targets), test, CLASSES, costs=(1.0,))

    usual = svm_map(train, test, CLASSES, costs=(1.0,))
    assert result_with(-1) == usual
    assert result_with(1) != usual


def test_difficult_images_are_left_out_in_testing() -> None:
    train, test = random_data(90, 0), random_data(90, 1)
    assert not (test.targets[3] == 0).all()
    test.targets[3] = 0
    test.features[3] = 1e3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    others = np.arange(90) != 3
    without = LabelledFeatures(test.features[others], test.targets[others])
    result = svm_map(train, test, CLASSES, costs=(1.0,))
    assert result == svm_map(train, without, CLASSES, costs=(1.0,))


def test_the_number_of_processes_does_not_change_the_result() -> None:
    """With features that are large enough to be shared in a file."""
    train, test = random_data(120, 0, width=1200), random_data(60, 1, width=1200)
    alone = svm_map(train, test, CLASSES, costs=(0.1, 10.0), jobs=1)
    together = svm_map(train, test, CLASSES, costs=(0.1, 10.0), jobs=2)
    assert alone == together


def test_fits_that_do_not_converge_are_counted_without_a_warning(
    capfd: pytest.CaptureFixture[str],
) -> None:
    train, test = random_data(90, 0), random_data(60, 1)
    lengths = train.features.norm(dim=1, keepdim=True)
    nearly_equal = train._replace(features=1 + 1e-3 * train.features / lengths)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = svm_map(nearly_equal, test, CLASSES, costs=(0.01, 1e6))
    assert 0 < result.not_converged < result.fits == 21
    assert not caught
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_a_class_with_too_few_training_images_is_named() -> None:
    train, test = random_data(60, 0), random_data(60, 1)
    positives = np.flatnonzero(train.targets[:, 1] == 1)
    train.targets[positives[2:], 1] = 0
    with pytest.raises(ValueError, match=r"^only 2 training images show bee: .* at least 3"):
        svm_map(train, test, CLASSES)


def test_a_class_with_too_few_negatives_is_named() -> None:
    train, test = random_data(60, 0), random_data(60, 1)
    train.targets[2:, 2] = 1
    with pytest.raises(ValueError, match=r"^only [012] training images do not show cat"):
        svm_map(train, test, CLASSES)


def test_a_class_without_a_test_image_is_named() -> None:
    train, test = random_data(60, 0), random_data(60, 1)
    test.targets[:, 0] = np.minimum(test.targets[:, 0], 0)
    with pytest.raises(ValueError, match="no test image shows ant"):
        svm_map(train, test, CLASSES)


def test_features_that_are_not_finite_are_refused() -> None:
    train, test = random_data(60, 0), random_data(60, 1)
    train.features[5, 3] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        svm_map(train, test, CLASSES)


def test_an_image_whose_features_are_all_zero_is_accepted() -> None:
    train, test = random_data(60, 0), random_data(60, 1)
    train.features[0] = 0
    test.features[0] = 0
    result = svm_map(train, test, CLASSES, costs=(1.0,))
    assert np.isfinite(result.average_precisions).all()
