"""metrics.jsonl and TensorBoard's event files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from experiment.metrics import Metrics, read_metrics
from tests.helpers.libraries import import_or_skip
from tests.helpers.runs import TRAIN


class Events:
    """The events in a folder, as TensorBoard reads them."""

    def __init__(self, folder: Path) -> None:
        accumulator = import_or_skip("tensorboard.backend.event_processing.event_accumulator")
        self.accumulator = accumulator.EventAccumulator(str(folder)).Reload()

    def __getitem__(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.accumulator.Scalars(tag)]


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Events]:
    """TensorBoard without tensorflow, even if that is installed: it takes 15 s to import."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
    return Events


def test_values_are_written_as_json_and_for_tensorboard(
    tmp_path: Path, tensorboard: type[Events]
) -> None:
    threads = threading.enumerate()
    open_files = len(os.listdir("/proc/self/fd"))
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        values = {"loss": 0.1, "skipped": 3, "warning": "it is {late}", "knn_top1": None}
        metrics.write(0, values)
        metrics.write(10, {"loss": math.nan, "lr": math.inf})
        events = tensorboard(tmp_path / "tensorboard")  # before the file is closed
        assert threading.enumerate() == threads
    assert len(os.listdir("/proc/self/fd")) == open_files

    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 0, **values}
    assert second == '{"step": 10, "loss": null, "lr": null}'

    assert sorted(events.accumulator.Tags()["scalars"]) == ["loss", "lr", "skipped"]
    assert events["skipped"] == [(0, 3.0)]
    assert events["loss"][0] == (0, float(np.float32(0.1)))
    assert math.isnan(events["loss"][1][1])
    assert events["lr"] == [(10, math.inf)]


def test_a_resumed_run_replaces_the_values_of_the_steps_it_repeats(
    tmp_path: Path, tensorboard: type[Events]
) -> None:
    path = tmp_path / "metrics.jsonl"
    expected: list[tuple[int, float]] = []
    for run, (first, last) in enumerate([(0, 50), (30, 60), (30, 40), (40, 70)]):
        with Metrics(path, first) as metrics:
            for step in range(first, last, 10):
                metrics.write(step, {"loss": float(run)})
        expected = [(step, value) for step, value in expected if step < first]
        expected += [(step, float(run)) for step in range(first, last, 10)]

        # What a run leaves that is killed while it writes.
        with path.open("a") as file:
            file.write('{"step": 5, "warning": "torn at a }')
        newest = sorted((tmp_path / "tensorboard").iterdir())[-1]
        with newest.open("ab") as events:
            events.write(b"\x18\0\0")

        assert tensorboard(tmp_path / "tensorboard")["loss"] == expected
        assert [(row["step"], row["loss"]) for row in read_metrics(path)] == expected


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n')
    with Metrics(path, 0):
        pass
    assert path.read_text() == ""
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_without_tensorboard_only_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write(0, {"loss": 1.0})
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_writing_events_imports_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    import_or_skip("tensorboard")
    code = (
        "import pathlib, sys\n"
        "from experiment.metrics import Metrics\n"
        f"with Metrics(pathlib.Path({str(tmp_path)!r}) / 'm', 0): pass\n"
        "heavy = {'torch', 'tensorflow', 'grpc'} & sys.modules.keys()\n"
        "print('tensorboard' in sys.modules, *heavy)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
