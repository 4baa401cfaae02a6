"""Health of a run: tests on held-out images, skipped steps, divergence and collapse."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model
from experiment.metrics import read_metrics
from tests.helpers.runs import (
    TINY,
    Command,
    assert_refused,
    at_step,
    read_summary,
    same_weights,
    saved_step,
    weights_of,
)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def test_evaluation_during_training_does_not_change_the_weights(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    options = ["--data", photos, *TINY, "--epochs", "4"]
    for name, more in (("without", []), ("with", ["--eval-epochs", "2"])):
        status, text = train(*options, *more, "--run-folder", tmp_path / name)
        assert status == 0, text
    assert same_weights(tmp_path / "without", tmp_path / "with")

    tested = [line for line in metrics_of(tmp_path / "with") if "knn_top1" in line]
    assert [line["step"] for line in tested] == [11, 23]
    assert tested[-1]["knn_top1"] == read_summary(tmp_path / "with")["knn_top1_trained"]
    assert 0 <= tested[-1]["probe_top1"] <= 100
    assert not any("probe_top1" in line for line in metrics_of(tmp_path / "without"))


def make_gradients_nan(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """In these steps, counted from the next one."""
    backward = torch.Tensor.backward
    step = itertools.count()

    def patched_backward(loss: Tensor) -> None:
        backward(loss * (math.nan if next(step) in steps else 1))

    monkeypatch.setattr(torch.Tensor, "backward", patched_backward)


def test_a_step_with_nan_gradients_is_skipped_and_counted(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", photos, *TINY, "--epochs", "2", "--log-steps", "1", "--lr", "0.6"]
    make_gradients_nan(monkeypatch, range(7, 9))
    status, text = train(*options, "--run-folder", tmp_path / "run")
    assert status == 0, text
    skipped = [line["skipped"] for line in metrics_of(tmp_path / "run")]
    assert skipped == [0] * 7 + [1, 2, 2, 2, 2]
    weights = weights_of(tmp_path / "run")
    assert all(value.isfinite().all() for value in weights.values())
    updates = weights["backbone.bn1.num_batches_tracked"]
    assert updates == 2 * 10, "two views in each step that was not skipped"


def test_many_skipped_steps_in_a_row_end_the_run_with_the_state_before_them(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ["--data", photos, *TINY, "--epochs", "4", "--log-steps", "1"]
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: make_gradients_nan(patch, range(100)))
        result = train(*options, "--run-folder", run)
    assert_refused(result, "at step 20", "16 steps in a row", "lower --lr", "before these steps")
    assert saved_step(run) == 5

    status, text = train(*options, "--run-folder", run, "--resume")  # with good gradients again
    assert status == 0, text
    assert train(*options, "--run-folder", tmp_path / "uninterrupted")[0] == 0
    assert same_weights(run, tmp_path / "uninterrupted")


def test_a_collapse_is_printed_once_and_recorded(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing = iter([(0.6, 40), (0.5, 30), *[(0.01, 1.1)] * 10])
    original = model.readings

    def patched_readings(output: model.BarlowTwinsOutput) -> dict[str, float]:
        deviation, rank = next(collapsing)
        return original(output) | {"feature_deviation": deviation, "effective_rank": rank}

    monkeypatch.setattr(model, "readings", patched_readings)
    run = tmp_path / "run"
    options = ["--data", photos, *TINY, "--epochs", "1", "--log-steps", "1"]
    status, text = train(*options, "--run-folder", run)
    assert status == 0, text
    warning = "step 2: possible collapse: the feature deviation fell from "
    assert text.count(warning) == 1
    warned = ["feature deviation fell" in str(line["warning"]) for line in metrics_of(run)]
    assert warned == [False, False, True, False, False, False]
