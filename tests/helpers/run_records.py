"""Folders of runs, healthy and unhealthy, as train.py would leave them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = {
    "preset": "demo",
    "images": 6400,
    "batch_size": 64,
    "epochs": 2,
    "lr": 0.2,
    "blur_p": [1.0, 0.1],
    "lambd": 0.005,
}


def healthy_line(step: int, steps: int = 200) -> dict[str, Any]:
    """The line of metrics.jsonl that a healthy run of `steps` steps writes at a step."""
    part = step / steps
    values = {
        "step": step,
        "epoch": step / 100,
        "lr": 0.05 * min(1.0, 10 * part),
        "lr_biases": 0.001 * min(1.0, 10 * part),
        "loss": 500 * math.exp(-2 * part),
        "invariance": 400 * math.exp(-3 * part),
        "redundancy": 2000.0,
        "diagonal_mean": 0.9 * part,
        "off_diagonal_rms": 0.2,
        "feature_deviation": 0.5 + 0.4 * part,
        "effective_rank": 20 + 60 * part,
        "skipped": 0,
        "bad_images": 0,
        "images_per_s": 1000.0,
        "data_wait_fraction": 0.01,
    }
    if step % 50 == 49:
        values["knn_top1"] = 10 + 40 * part
        values["probe_top1"] = 12 + 50 * part
    return values


def write_run(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    """Write config.json and metrics.jsonl into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Illness(NamedTuple):
    """What is wrong with a run, and the finding that must name it."""

    severity: str
    title: str
    words: str  # in the text of the finding
    symptoms: dict[str, Any]  # the metrics that differ from those of a healthy run


ILLNESSES = {
    "collapsed": Illness(
        "bad",
        "Collapsed",
        "lower --lr",
        {"effective_rank": 1.01, "feature_deviation": 0.001},
    ),
    "less diverse": Illness(
        "warn", "The features are getting less diverse", "collapse", {"effective_rank": 15.0}
    ),
    "starved": Illness(
        "warn",
        "Starved for data",
        "40.0% of the time is spent waiting for data. `python -m bench`",
        {"data_wait_fraction": 0.4},
    ),
    "loss rises": Illness("warn", "The loss is rising", "the lowest was 112.7", {"loss": 300.0}),
    "loss does not fall": Illness(
        "warn", "The loss has not fallen", "From 500 to 510 (+2%)", {"loss": 510.0}
    ),
    "diverged": Illness("bad", "Diverged", "since step 150", {"loss": None, "invariance": None}),
    "many steps skipped": Illness("bad", "Steps were skipped", "90 of 200", {"skipped": 90}),
    "one step skipped": Illness("note", "Steps were skipped", "1 of 200", {"skipped": 1}),
    "bad images": Illness("warn", "Images cannot be decoded", "320 of 6,400", {"bad_images": 320}),
    "redundant": Illness(
        "warn", "The dimensions are redundant", "--lambd", {"off_diagonal_rms": 0.8}
    ),
    "views differ": Illness("warn", "The views do not agree yet", "milder", {"diagonal_mean": 0.1}),
    "warnings": Illness(
        "warn",
        "50 warnings, from step 150 to 199",
        "the disk is <slow>",
        {"warning": "the disk is <slow>"},
    ),
}


def unhealthy_lines(illness: Illness) -> list[dict[str, Any]]:
    """The metrics of a run that is healthy for 150 steps and ill for 50."""
    healthy = [healthy_line(step) for step in range(150)]
    return healthy + [healthy_line(step) | illness.symptoms for step in range(150, 200)]
