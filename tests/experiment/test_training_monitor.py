"""What a run observes about itself: metrics, warnings, divergence, bad images, and its progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiment import Console, Metrics, ThroughputMeter
from experiment.metrics import read_metrics
from experiment.training_monitor import Progress, TrainingMonitor
from model import CollapseMonitor

READINGS = {
    "loss": 10.0,
    "invariance": 4.0,
    "redundancy": 600.0,
    "diagonal_mean": 0.5,
    "off_diagonal_rms": 0.1,
    "feature_deviation": 0.8,
    "effective_rank": 30.0,
}
RATES = {"lr": 0.2, "lr_biases": 0.01}


class FourSteps:
    """A loader of four steps per epoch, with the images that it has found to be bad."""

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        self.store = SimpleNamespace(name=lambda sample: f"image {sample}")

    def __len__(self) -> int:
        return 4


Monitors = Callable[..., TrainingMonitor]


@pytest.fixture
def monitor_for(tmp_path: Path) -> Iterator[Monitors]:
    """Makes monitors whose metrics are in `metrics.jsonl`, and closes the files afterwards."""
    with ExitStack() as files:

        def make(loader: Any, progress: Progress | None = None) -> TrainingMonitor:
            progress = progress or Progress()
            path = tmp_path / "metrics.jsonl"
            return TrainingMonitor(
                Console(),
                files.enter_context(Metrics(path, progress.step)),
                loader,
                ThroughputMeter(8, progress.throughput),
                CollapseMonitor(progress.highest_readings),
                progress,
            )

        yield make


def test_a_line_of_metrics_has_the_epoch_the_rates_and_the_scores(
    monitor_for: Monitors, tmp_path: Path
) -> None:
    monitor = monitor_for(FourSteps())
    monitor.log(5, READINGS, RATES, torch.tensor([2.0, 0.0]), {"knn_top1": 40.0})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 5
    assert line["epoch"] == 1.5
    assert {name: line[name] for name in RATES} == RATES
    assert {name: line[name] for name in READINGS} == READINGS
    assert (line["skipped"], line["bad_images"], line["warning"]) == (2, 0, None)
    assert line["knn_top1"] == 40.0


def test_the_first_loss_is_kept_over_a_resumed_run(monitor_for: Monitors, tmp_path: Path) -> None:
    monitor = monitor_for(FourSteps())
    monitor.log(0, READINGS, RATES, torch.zeros(2), {})
    monitor.log(1, {**READINGS, "loss": 7.0}, RATES, torch.zeros(2), {})
    saved = monitor.progress(2).to_checkpoint()
    resumed = monitor_for(FourSteps(), Progress.from_checkpoint(saved))
    resumed.log(2, {**READINGS, "loss": 6.0}, RATES, torch.zeros(2), {})
    assert resumed.first_loss == 10.0
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 7, 6]


def test_a_collapse_is_printed_and_written_once(
    monitor_for: Monitors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = monitor_for(FourSteps())
    for step, rank in enumerate((30.0, 1.0, 1.0)):
        readings = {**READINGS, "effective_rank": rank}
        monitor.log(step, readings, RATES, torch.zeros(2), {})
    warnings = [line["warning"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert warnings[0] is None
    assert "effective rank fell from 30 to 1;" in warnings[1]
    assert warnings[2] is None
    assert capsys.readouterr().out.count("step 1: ") == 1


def test_sixteen_skipped_steps_in_a_row_are_a_divergence(monitor_for: Monitors) -> None:
    monitor = monitor_for(FourSteps())
    monitor.log(20, READINGS, RATES, torch.tensor([40.0, 15.0]), {})
    assert not monitor.has_diverged()
    monitor.log(21, {**READINGS, "loss": math.nan}, RATES, torch.tensor([41.0, 16.0]), {})
    assert monitor.has_diverged()
    message = monitor.divergence(21)
    assert "nan at step 21" in message
    assert "16 steps in a row" in message
    assert "--lr" in message


def test_each_bad_image_is_printed_once(
    monitor_for: Monitors, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = FourSteps()
    monitor = monitor_for(loader)
    loader.bad[3] = "truncated"
    monitor.print_bad_images()
    monitor.print_bad_images()
    loader.bad[7] = "empty"
    monitor.print_bad_images()
    text = capsys.readouterr().out
    assert text.count("image 3: truncated") == 1
    assert text.count("image 7: empty") == 1


def test_the_entries_of_a_checkpoint_have_the_names_that_earlier_versions_wrote() -> None:
    saved = Progress(3, 9.0, {"loss": 8.0}, {"images": 24}, {"effective_rank": 30.0})
    assert saved.to_checkpoint() == {
        "step": 3,
        "loss_first": 9.0,
        "values": {"loss": 8.0},
        "fed": {"images": 24},
        "highest": {"effective_rank": 30.0},
    }
    assert Progress.from_checkpoint(saved.to_checkpoint()) == saved
    assert Progress.from_checkpoint({"step": 5}).step == 5, "weights of another project"
    assert Progress.from_checkpoint(None).step == 0
