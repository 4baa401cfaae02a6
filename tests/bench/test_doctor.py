"""`python -m bench doctor`: what it reports about libraries, the GPU and the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pipeline
from bench import doctor
from tests.bench.conftest import Bench
from tests.helpers.libraries import import_or_skip

ROOT = Path(__file__).parents[2]


def line_about(text: str, name: str) -> str:
    """The line about something, and the line with its remedy if there is one."""
    (line,) = re.findall(rf"^{name} .*(?:\n +->.*)?", text, re.MULTILINE)
    return line


def test_everything_is_examined(bench: Bench) -> None:
    status, text = bench("doctor")
    assert status == 0
    for library in doctor.LIBRARIES:
        assert library.purpose in line_about(text, library.distribution)
    names = ("python", "GPU", "cores", "memory", "cache folder", "this folder")
    for name in (*names, "huge pages", "open files"):
        line_about(text, name)
    assert "ok" in line_about(text, "torch")
    assert metadata.version("torch") in line_about(text, "torch")
    assert "WRONG" not in text


def test_an_optional_library_that_cannot_be_imported_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_or_skip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, text = bench("doctor")
    assert status == 0
    assert re.search(
        r"missing  .*cannot be imported: import of matplotlib.*\n.*-> uv sync --group bench",
        line_about(text, "matplotlib"),
    )


def test_a_required_library_that_cannot_be_imported_is_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    status, text = bench("doctor")
    assert status == 1
    pattern = r"WRONG .*cannot be imported: .*\n.*-> uv sync"
    assert re.search(pattern, line_about(text, "simplejpeg"))


def test_it_works_without_torch() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, Absent())
from bench.__main__ import main
from experiment import Console
sys.exit(main(["doctor"], Console()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "WRONG" in line_about(done.stdout, "torch")
    assert "cores" in done.stdout


def test_a_library_that_is_not_installed() -> None:
    library = doctor.Library("nothing", "no-such-library", "does much", "uv sync --group much")
    finding = doctor.examine_library(library)
    assert finding.name == "no-such-library"
    assert finding.state == "missing"
    assert finding.description == "not installed: does much"
    assert finding.remedy == "uv sync --group much"
    assert doctor.examine_library(library._replace(required=True)).state == "WRONG"


def examine_cores(monkeypatch: pytest.MonkeyPatch, limit_file: Path) -> doctor.Finding:
    """The finding about cores on a machine with 16 usable ones."""
    monkeypatch.setattr(doctor, "_CPU_LIMIT", limit_file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return next(finding for finding in doctor.examine_machine() if finding.name == "cores")


def test_a_quota_below_the_cores_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    finding = examine_cores(monkeypatch, tmp_path / "cpu.max")
    assert finding.description == (f"{os.cpu_count()} cores, 16 usable, container quota 3.5")
    assert finding.remedy == "--threads 3"


@pytest.mark.parametrize("limit", ["max 100000\n", "9900000 100000\n", "rubbish"])
def test_no_quota_is_reported_without_a_limit_below_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    finding = examine_cores(monkeypatch, tmp_path / "cpu.max")
    assert finding.description == f"{os.cpu_count()} cores, 16 usable"
    assert finding.remedy == ""


def test_a_driver_that_is_too_old_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str = "auto") -> torch.device:
        raise ValueError("the driver is too old")

    monkeypatch.setattr(pipeline, "find_device", fail)
    status, text = bench("doctor")
    assert status == 1
    pattern = r"WRONG +the driver is too old\n.*release 580"
    assert re.search(pattern, line_about(text, "GPU"))
