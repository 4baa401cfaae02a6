"""Readings of features against their definitions, collapse in words, and steps that are skipped in a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import model
from evaluation import probe_accuracy
from model import CollapseMonitor, correlation_corner, feature_readings, normalize
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, Train, at_step, refused, same_weights


def clusters(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian clusters in 6 dimensions, of which one has another scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 1.2 * torch.randn(classes, 6, generator=torch.Generator().manual_seed(0))
    return (centres[labels] + torch.randn(n, 6, generator=generator)) * torch.tensor(
        [1, 1, 1, 50, 1, 1.0]
    ), labels


def test_the_readings_are_what_they_are_said_to_be() -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).abs()
    found = feature_readings(x)
    directions = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    spread = np.sqrt(directions.var(axis=0).sum())
    share = np.linalg.svd(directions, compute_uv=False)
    share /= share.sum()
    assert found["feature_deviation"] == pytest.approx(spread, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(
        np.exp(-(share * np.log(share)).sum()), rel=1e-4
    )


def test_the_readings_at_their_ends() -> None:
    same, apart = feature_readings(torch.ones(64, 16)), feature_readings(torch.eye(16).repeat(4, 1))
    assert same["feature_deviation"] == pytest.approx(0, abs=1e-3)
    assert same["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert apart["feature_deviation"] == pytest.approx(math.sqrt(15 / 16))
    assert apart["effective_rank"] == pytest.approx(16, rel=1e-4)
    assert all(
        math.isnan(value) for value in feature_readings(torch.full((8, 4), torch.nan)).values()
    )


def test_a_corner_of_the_correlation() -> None:
    a, b = (
        normalize(torch.randn(50, 9, generator=torch.Generator().manual_seed(i))) for i in range(2)
    )
    corner = correlation_corner(a, b, 5)
    expected = np.corrcoef(a.T.numpy(), b.T.numpy())[:9, 9:][:5, :5]
    assert corner.dtype == torch.float16
    np.testing.assert_allclose(corner.numpy(), expected, atol=2e-3)


def readings(deviation: float, rank: float) -> dict[str, float]:
    return {"feature_deviation": deviation, "effective_rank": rank}


def test_collapse_is_said_once_and_again_after_a_recovery() -> None:
    collapse = CollapseMonitor()
    assert [collapse.warning(readings(d, 40)) for d in (0.2, 0.6, 0.3, 0.07)] == [None] * 4
    words = collapse.warning(readings(0.05, 40))
    assert words is not None
    assert (
        "features of different images are becoming the same (feature deviation 0.05, it was 0.6)"
        in words
    )
    assert "dimensions" not in words
    assert collapse.warning(readings(0.01, 40)) is None, "it has been said"
    assert collapse.warning(readings(0.4, 40)) is None
    words = collapse.warning(readings(0.02, 2))
    assert words is not None
    assert "becoming the same" in words
    assert "ever fewer dimensions (effective rank 2, it was 40)" in words


def test_collapse_remembers_over_a_resume_and_takes_no_number_for_none() -> None:
    collapse = CollapseMonitor(readings(0.6, 40))
    assert "effective rank 3" in str(collapse.warning(readings(0.5, 3)))
    collapse = CollapseMonitor(readings(0.6, 40))
    collapse.warning(readings(math.nan, math.nan))
    assert collapse.highest == readings(0.6, 40)


@pytest.mark.parametrize("decay", [1e-3, 0.1])
def test_the_probe_is_the_minimum_that_another_solver_finds(decay: float) -> None:
    (bank, bank_labels), (queries, labels) = clusters(120, 4, 1), clusters(2000, 4, 2)
    x, mean, deviation = (
        bank.double().numpy(),
        bank.mean(0).numpy(),
        bank.std(0, correction=0).numpy(),
    )
    x = np.hstack([(x - mean) / deviation, np.ones((len(x), 1))])

    def loss(flat: np.ndarray) -> float:
        w = flat.reshape(4, 7)
        logits = x @ w.T
        picked = logits[np.arange(len(x)), bank_labels.numpy()]
        return float(
            np.mean(np.logaddexp.reduce(logits, axis=1) - picked)
            + decay / 2 * (w[:, :6] ** 2).sum()
        )

    weight = minimize(loss, np.zeros(28), method="L-BFGS-B", options={"maxiter": 2000}).x.reshape(
        4, 7
    )
    asked = np.hstack([(queries.numpy() - mean) / deviation, np.ones((2000, 1))])
    expected = 100 * float(np.mean((asked @ weight.T).argmax(1) == labels.numpy()))
    found = probe_accuracy(bank, bank_labels, queries, labels, decay)
    assert found == pytest.approx(expected, abs=0.3)
    assert found > 40, "chance is 25"


def test_a_probe_on_a_feature_that_never_changes_is_a_guess() -> None:
    labels = torch.arange(30) % 3
    assert probe_accuracy(torch.ones(30, 2), labels, torch.ones(30, 2), labels) == pytest.approx(
        100 / 3
    )


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 60)


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_held_out_images_are_tested_on_the_way_and_teach_nothing(
    train: Train, photos: Path, tmp_path: Path
) -> None:
    options = ["--data", photos, *TINY, "--epochs", "4"]
    for name, more in (("without", []), ("with", ["--eval-epochs", "2"])):
        status, text = train(*options, *more, "--run", tmp_path / name)
        assert status == 0, text
    assert same_weights(tmp_path / "without", tmp_path / "with")
    assert [line["step"] for line in lines(tmp_path / "with") if "knn_top1" in line] == [11, 23]
    assert not [line for line in lines(tmp_path / "without") if "probe_top1" in line]
    last = lines(tmp_path / "with")[-1]
    assert (
        last["knn_top1"]
        == json.loads((tmp_path / "with" / "summary.json").read_text())["knn_top1_trained"]
    )
    assert 0 <= float(str(last["probe_top1"])) <= 100


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Gradients of those steps are not finite."""
    backward, calls = torch.Tensor.backward, []

    def spoilt(loss: Tensor) -> None:
        calls.append(None)
        backward(loss * (math.nan if len(calls) - 1 in steps else 1))

    monkeypatch.setattr(torch.Tensor, "backward", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", photos, *TINY, "--epochs", "2", "--log-steps", "1", "--lr", "0.6"]
    spoil(monkeypatch, range(7, 9))
    status, text = train(*options, "--run", tmp_path / "run")
    assert status == 0, text
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [0] * 7 + [1, 2, 2, 2, 2]
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["model"]["backbone.bn1.num_batches_tracked"] == 2 * 10, (
        "two views of each step that counts"
    )


def test_many_in_a_row_end_the_run_with_the_state_from_before_them(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = tmp_path / "run", ["--data", photos, *TINY, "--epochs", "4", "--log-steps", "1"]
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: spoil(patch, range(0, 100)))
        result = train(*options, "--run", run)
    refused(
        result, "at step 20", "16 steps in a row", "lower --lr", "checkpoint.pt is from before that"
    )
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 5
    status, text = train(*options, "--run", run, "--resume")  # what was wrong has gone
    assert status == 0, text
    assert train(*options, "--run", tmp_path / "whole")[0] == 0
    assert same_weights(run, tmp_path / "whole")


def test_a_collapse_is_said_and_written_down(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([readings(0.6, 40), readings(0.5, 30), *[readings(0.01, 1.1)] * 10])
    health = model.readings
    monkeypatch.setattr(model, "readings", lambda twins: health(twins) | next(found))
    run = tmp_path / "run"
    status, text = train("--data", photos, *TINY, "--epochs", "1", "--log-steps", "1", "--run", run)
    assert status == 0, text
    assert (
        text.count("step 2: collapse? the features of different images are becoming the same") == 1
    )
    assert ["becoming the same" in str(line["warning"]) for line in lines(run)] == [False] * 2 + [
        True
    ] + [False] * 3
