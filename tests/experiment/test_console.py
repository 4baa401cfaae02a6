"""What a run shows and says."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import experiment
import pipeline
from experiment import provenance
from experiment.metrics import Metrics, read_metrics
from experiment.provenance import environment
from tests.helpers.libraries import needed
from tests.helpers.runs import TRAIN


def test_the_picture_shows_images_that_decode(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    store = pipeline.open_store(tmp_path / "data")
    recipe = pipeline.barlow_twins(32)
    whole = pipeline.view_grid(store, recipe)
    assert whole is not None
    assert whole.size == (8 * (96 + 4) + 4, 3 * (96 + 4) + 4)
    for sample in pipeline.loader.epoch_order(len(store), 0, 0)[3:]:
        Path(store.name(int(sample))).write_bytes(b"")
    three = pipeline.view_grid(store, recipe)
    assert three is not None
    assert three.width == 3 * (96 + 4) + 4
    for sample in range(len(store)):
        Path(store.name(sample)).write_bytes(b"")
    assert pipeline.view_grid(store, recipe) is None


def test_a_run_goes_on_when_nobody_reads_what_it_says() -> None:
    code = "import time, sys\nfrom experiment import Console\nwith Console() as console:\n"
    code += "    for i in range(50): console.print(str(i)); time.sleep(0.01)\n    print('trained', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=TRAIN.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read() == "trained\n"
    assert process.wait() == 0


class Ticker:
    """What a folder of TensorBoard's says, read by TensorBoard."""

    def __init__(self, folder: Path) -> None:
        accumulator = needed("tensorboard.backend.event_processing.event_accumulator")
        self.events = accumulator.EventAccumulator(str(folder)).Reload()

    def __getitem__(self, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.events.Scalars(tag)]


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Ticker]:
    """Without tensorflow, also where that is installed: it takes a quarter of a minute to import."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
    return Ticker


def test_values_are_written_for_machines_and_for_tensorboard(
    tmp_path: Path, tensorboard: type[Ticker]
) -> None:
    threads, files = threading.enumerate(), len(os.listdir("/proc/self/fd"))
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write(step=0, loss=0.1, skipped=3, warning="it is {late}", knn_top1=None)
        metrics.write(step=10, loss=math.nan, lr=math.inf)
        shown = tensorboard(tmp_path / "tensorboard")  # while the run goes on
        assert threading.enumerate() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "step": 0,
        "loss": 0.1,
        "skipped": 3,
        "warning": "it is {late}",
        "knn_top1": None,
    }
    assert second == '{"step": 10, "loss": null, "lr": null}'
    assert sorted(shown.events.Tags()["scalars"]) == ["loss", "lr", "skipped"]
    assert shown["skipped"] == [(0, 3.0)]
    assert shown["loss"][0] == (0, float(np.float32(0.1)))
    assert math.isnan(shown["loss"][1][1])
    assert shown["lr"] == [(10, math.inf)]


def test_a_resumed_run_shows_nothing_of_what_it_does_again(
    tmp_path: Path, tensorboard: type[Ticker]
) -> None:
    path = tmp_path / "metrics.jsonl"
    expected: list[tuple[int, float]] = []
    for run, (first, last) in enumerate([(0, 50), (30, 60), (30, 40), (40, 70)]):
        with Metrics(path, first) as metrics:
            for step in range(first, last, 10):
                metrics.write(step=step, loss=float(run))
        expected = [(step, value) for step, value in expected if step < first]
        expected += [(step, float(run)) for step in range(first, last, 10)]
        with path.open("a") as file:
            file.write('{"step": 5, "warning": "torn at a }')
        (events,) = sorted((tmp_path / "tensorboard").iterdir())[-1:]
        with events.open("ab") as torn:  # as a run leaves it that is killed while it writes
            torn.write(b"\x18\0\0")
        assert tensorboard(tmp_path / "tensorboard")["loss"] == expected
        assert [(row["step"], row["loss"]) for row in read_metrics(path)] == expected


def test_without_tensorboard_nothing_is_said_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write(step=0, loss=1.0)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_neither_torch_nor_tensorflow_is_imported_for_the_sake_of_curves(tmp_path: Path) -> None:
    code = f"import sys, metrics, pathlib\nwith metrics.Metrics(pathlib.Path({str(tmp_path)!r}) / 'm', 0): pass\n"
    code += (
        "print('tensorboard' in sys.modules, *{'torch', 'tensorflow', 'grpc'} & sys.modules.keys())"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    said = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("True\n", "")


def test_the_environment_says_what_ran_and_not_whose_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setattr(
        sys, "argv", ["/home/jane/train.py", "--data=/home/jane/my data", "/mnt/home/jane/x"]
    )
    found = environment(["cpu, 2 cores", "cpu, 2 cores"])
    assert shlex.split(found["command"]) == ["~/train.py", "--data=~/my data", "/mnt/home/jane/x"]
    assert (found["ranks"], found["devices"]) == (2, ["cpu, 2 cores"])
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["python"] == sys.version.split()[0]
    assert abs(datetime.fromisoformat(found["started"]).timestamp() - time.time()) < 60
    total = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0])
    assert 0 < found["memory_gib"] <= round(total / 2**20, 1)
    assert socket.gethostname() not in json.dumps(found)
    (tmp_path / "max").write_text(f"{3 << 30}\n")
    monkeypatch.setattr(provenance, "_MEMORY_MAX", tmp_path / "max")
    assert environment(["cpu"])["memory_gib"] == min(3.0, round(total / 2**20, 1))


def test_the_commit_is_that_of_the_program_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(
            ["git", "-C", str(tmp_path), *identity, *arguments], text=True
        ).strip()

    git("init", "-q")
    (tmp_path / "inside").mkdir()
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-qm", "one")
    git("tag", "v1")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert environment([])["commit"] == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "runs").mkdir()
    (tmp_path / "train.py").write_text("2")
    assert environment([])["commit"] == git("rev-parse", "--short=12", "HEAD") + "-dirty"
    monkeypatch.setattr(provenance, "_ROOT", tmp_path / "inside")
    assert environment([])["commit"] is None


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    experiment.write_json(
        tmp_path / "x.json",
        {"a": [math.nan, 1.5, (math.inf, "x")], "b": {"c": -math.inf}, "d": None},
    )
    read = json.loads(
        (tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert read == {"a": [None, 1.5, [None, "x"]], "b": {"c": None}, "d": None}
