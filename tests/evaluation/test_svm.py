"""The SVMs of VOC 2007's protocol: average precision by hand and by brute force, the rest against scikit-learn's."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from evaluation import average_precision, svm_map
from tests.test_house import ROOT, tops


def scored(targets: list[int], scores: list[float]) -> float:
    return average_precision(np.array(targets, dtype=np.int8), np.array(scores, dtype=np.float64))


# ── average precision ────────────────────────────────────────────────────────────────────────────────────────────────


def test_average_precision_of_a_case_computed_by_hand() -> None:
    """In order of score: + - + + - -, with a difficult one in between. Precision at each hit: 1, 2/3, 3/4; the second
    gets the third's, which is better. A third of the recall each: (1 + 3/4 + 3/4) / 3."""
    assert scored([-1, 1, 1, 0, -1, 1, -1], [0.8, 0.7, 0.9, 0.75, 0.1, 0.5, 0.2]) == pytest.approx(
        2.5 / 3
    )


@pytest.mark.parametrize(
    ("targets", "scores", "expected"),
    [
        ([1, 1, -1], [3, 2, 1], 1.0),
        ([-1, -1, 1], [3, 2, 1], 1 / 3),
        ([1, -1, -1, -1], [5, 5, 5, 5], 1 / 4),  # all at once: the share of positives
        (
            [1, -1, 1, -1],
            [2, 1, 1, 0],
            1 / 2 + 1 / 2 * 2 / 3,
        ),  # one of the two that are equal is wrong
        ([0, 0, 1], [3, 2, 1], 1.0),
    ],
)
def test_average_precision_of_corner_cases(
    targets: list[int], scores: list[float], expected: float
) -> None:
    for order in (slice(None), slice(None, None, -1)):
        assert scored(targets[order], scores[order]) == pytest.approx(expected)


def test_average_precision_is_the_area_under_the_best_precision_at_each_recall() -> None:
    """By brute force: every threshold, every recall. Without interpolation it would be scikit-learn's, and less."""
    rng = np.random.default_rng(0)
    lifted = 0
    for case in range(200):
        n = int(rng.integers(3, 40))
        targets = rng.choice(np.array([-1, -1, 0, 1], dtype=np.int8), n)
        targets[rng.integers(n)] = 1
        scores = rng.integers(0, 10, n).astype(float) if case % 2 else rng.normal(size=n)
        counted = targets != 0
        points = []
        for threshold in np.unique(scores):
            accepted = counted & (scores >= threshold)
            if accepted.any():
                hits = int((targets[accepted] == 1).sum())
                points.append((hits / int((targets == 1).sum()), hits / int(accepted.sum())))
        steps = sorted({0.0, *(recall for recall, _ in points)})
        area = sum(
            (recall - before) * max(p for r, p in points if r >= recall)
            for before, recall in pairwise(steps)
        )
        ours = average_precision(targets, scores)
        assert ours == pytest.approx(area)
        plain = average_precision_score(targets[counted] == 1, scores[counted])
        assert ours >= plain - 1e-12
        lifted += ours > plain + 1e-9
    assert lifted > 50


# ── the protocol ─────────────────────────────────────────────────────────────────────────────────────────────────────

COSTS = (0.001, 0.1, 5.0)
CLASSES = ["ant", "bee", "cat"]


def made(n: int, seed: int, width: int = 24) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Features that say something about three classes; one picture in twelve is difficult."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 3))
    features = causes @ np.random.default_rng(9).normal(size=(3, width)) + 2.5 * rng.normal(
        size=(n, width)
    )
    targets = np.where(causes > 0.6, 1, -1)
    targets[rng.random((n, 3)) < 1 / 12] = 0
    return torch.from_numpy(features * rng.uniform(0.1, 10, (n, 1))).float(), targets.astype(
        np.int8
    )


def test_results_are_those_of_scikit_learns_grid_search() -> None:
    (train, train_targets), (test, test_targets) = made(150, 0), made(120, 1)
    said: list[tuple[int, int]] = []
    result = svm_map(
        train,
        train_targets,
        test,
        test_targets,
        CLASSES,
        costs=COSTS,
        progress=lambda *done: said.append(done),
    )
    assert said == [(i + 1, 12) for i in range(12)]
    unit, test_unit = (
        x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None]
        for x in (train, test)
    )
    for c in range(3):
        svc = LinearSVC(
            class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=0
        )
        search = GridSearchCV(svc, {"C": COSTS}, cv=3, scoring="average_precision")
        search.fit(unit, np.where(train_targets[:, c] > 0, 1, -1))
        assert result.costs[c] == search.best_params_["C"]
        kept = test_targets[:, c] != 0
        expected = average_precision(
            test_targets[kept, c], search.decision_function(test_unit)[kept]
        )
        assert result.average_precisions[c] == pytest.approx(
            100 * expected, abs=0.3
        )  # 1e-5 in the norm
    assert len(set(result.costs)) > 1, "else the choice would not be tested"
    assert result.mean_average_precision == pytest.approx(np.mean(result.average_precisions))
    assert (result.fits, result.not_converged) == (30, 0)


def test_difficult_pictures_are_negatives_in_training_and_left_out_in_testing() -> None:
    (train, train_targets), (test, test_targets) = made(90, 0), made(90, 1)
    both = test, test_targets, CLASSES
    usual = svm_map(train, train_targets, *both, costs=(1.0,))
    assert usual == svm_map(
        train, np.where(train_targets == 0, -1, train_targets), *both, costs=(1.0,)
    )
    assert usual != svm_map(
        train, np.where(train_targets == 0, 1, train_targets), *both, costs=(1.0,)
    )
    test = test.clone()
    everywhere_difficult = torch.from_numpy((test_targets == 0).all(axis=1))
    test_targets[3] = 0
    test[3] = 1e3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    assert not everywhere_difficult[3]
    without = np.arange(90) != 3
    left_out = svm_map(
        train, train_targets, test[without], test_targets[without], CLASSES, costs=(1.0,)
    )
    assert left_out == svm_map(train, train_targets, test, test_targets, CLASSES, costs=(1.0,))


def test_processes_change_nothing() -> None:
    """With features that are large enough to be shared by a file."""
    (train, train_targets), (test, test_targets) = made(120, 0, width=1200), made(60, 1, width=1200)
    alone, together = (
        svm_map(train, train_targets, test, test_targets, CLASSES, costs=(0.1, 10.0), jobs=jobs)
        for jobs in (1, 2)
    )
    assert alone == together


def test_fits_that_do_not_converge_are_counted_and_make_no_noise(
    capfd: pytest.CaptureFixture[str],
) -> None:
    (train, train_targets), (test, test_targets) = made(90, 0), made(60, 1)
    train = 1 + 1e-3 * train / train.norm(dim=1, keepdim=True)  # nearly one and the same
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = svm_map(train, train_targets, test, test_targets, CLASSES, costs=(0.01, 1e6))
    assert 0 < result.not_converged < result.fits == 21
    assert not caught
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_classes_without_enough_pictures_are_named() -> None:
    (train, train_targets), (test, test_targets) = made(60, 0), made(60, 1)
    few, all_but_two, untested = train_targets.copy(), train_targets.copy(), test_targets.copy()
    few[np.flatnonzero(few[:, 1] == 1)[2:], 1] = 0
    all_but_two[2:, 2] = 1
    untested[:, 0] = np.minimum(untested[:, 0], 0)
    for targets, tested, said in (
        (few, test_targets, "^2 training pictures are with bee: 3 folds need 3"),
        (all_but_two, test_targets, "^[012] training pictures are without cat"),
        (train_targets, untested, "no test picture has ant"),
    ):
        with pytest.raises(ValueError, match=said):
            svm_map(train, targets, test, tested, CLASSES)
    train[5, 3] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        svm_map(train, train_targets, test, test_targets, CLASSES)


def test_an_image_without_features_is_no_error() -> None:
    (train, train_targets), (test, test_targets) = made(60, 0), made(60, 1)
    train[0] = test[0] = 0
    assert np.isfinite(
        svm_map(train, train_targets, test, test_targets, CLASSES, costs=(1.0,)).average_precisions
    ).all()


def test_scikit_learn_is_loaded_only_when_it_is_used() -> None:
    assert "sklearn" in tops(ROOT / "model" / "svm.py")
    assert "sklearn" not in tops(ROOT / "model" / "svm.py", at_module_level=True)
