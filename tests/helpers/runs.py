"""Runs of the commands, and what they write."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = Path(__file__).parents[2] / "train.py"

CPU = ["--device", "cpu"]

TINY = [
    *CPU,
    *("--size", "16"),
    *("--width", "8"),
    *("--projector", "32-32-32"),
    *("--batch-size", "8"),
]
"""Options of train.py for a network that trains about a hundred images per second on one core."""

SUMMARY = [
    *("preset", "device", "decoder", "backbone", "steps", "images_per_s", "data_wait_fraction"),
    *("loss_first", "loss_last"),
    *("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained"),
    *("checkpoint", "export"),
]
"""The keys of summary.json, in their order."""

Command = Callable[..., tuple[int, str]]
"""Runs train.py, convert.py or evaluate.py with the given arguments.

Returns the exit status and everything that was printed.
"""


def result_of(name: str) -> dict[str, Any]:
    """The results that `evaluate.py` has written to out/NAME.json."""
    return json.loads((Path("out") / f"{name}.json").read_text())


def outputs() -> set[str]:
    """The names of the files in the folder `out`; an empty set if there is no such folder."""
    return {path.name for path in Path("out").iterdir()} if Path("out").exists() else set()


def logged_steps(run: Path) -> list[int]:
    """The step of each line of metrics.jsonl. Every line must be intact."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def saved_step(run: Path) -> int:
    """The number of completed steps in the newest checkpoint of a run."""
    import torch

    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


def weights_of(run: Path) -> dict[str, Any]:
    """The state of the network in the newest checkpoint of a run."""
    import torch

    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same network, to the bit."""
    import torch

    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Call `action` once, at the beginning of this step of the next run in this process."""
    import model

    learning_rate_factor = model.learning_rate_factor
    done = False

    def patched(current_step: int, *arguments: Any, **options: Any) -> float:
        nonlocal done
        if current_step == step and not done:
            done = True
            action()
        return learning_rate_factor(current_step, *arguments, **options)

    monkeypatch.setattr(model, "learning_rate_factor", patched)


def ctrl_c() -> None:
    """Send this process the signal of Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def assert_refused(result: tuple[int, str], *words: str) -> None:
    """Check that a command has failed with one error message, as its last line.

    Args:
        result: The exit status and what was printed.
        words: What the error message must contain: what is wrong, and what to do about it.
    """
    status, text = result
    assert status not in (0, 130), text
    lines = text.strip().splitlines()
    (error,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert error == len(lines) - 1, text
    assert not [word for word in words if word not in lines[-1]], text
