"""Runs of the commands, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = Path(__file__).parents[2] / "train.py"


TINY = [
    "--device",
    "cpu",
    "--size",
    "16",
    "--width",
    "8",
    "--projector",
    "32-32-32",
    "--batch-size",
    "8",
]


SUMMARY = [
    *("preset", "device", "decoder", "backbone", "steps", "images_per_s", "data_wait_fraction"),
    *("loss_first", "loss_last"),
    *("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained"),
    *("checkpoint", "export"),
]


Train = Callable[..., tuple[int, str]]


CPU = ["--device", "cpu"]


def result_of(name: str) -> dict[str, Any]:
    return json.loads((Path("out") / f"{name}.json").read_text())


def outputs() -> set[str]:
    return {path.name for path in Path("out").iterdir()} if Path("out").exists() else set()


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def weights_of(run: Path) -> dict[str, Any]:
    import torch

    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one: Path, other: Path) -> bool:
    import torch

    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of a step of the next run."""
    import model

    schedule, done = model.learning_rate_factor, []

    def factor(now: int, *rest: Any, **named: Any) -> float:
        if now == step and not done:
            done.append(action())
        return schedule(now, *rest, **named)

    monkeypatch.setattr(model, "learning_rate_factor", factor)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def refused(result: tuple[int, str], *words: str) -> None:
    """A non-zero exit status, and one line that names what is wrong and what to do."""
    status, text = result
    assert status not in (0, 130), text
    lines = text.strip().splitlines()
    (error,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert error == len(lines) - 1, text
    assert not [word for word in words if word not in lines[-1]], text
