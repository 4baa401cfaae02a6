"""Which code, libraries and machine produced a result."""

from __future__ import annotations

import json
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest
import torch

from experiment.provenance import (
    command_line,
    cpu_name,
    environment,
    git_commit,
    gpu_settings,
    library_versions,
    memory_gib,
)


def physical_memory_gib() -> float:
    kib = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0]
    return int(kib) / 2**20


def test_the_environment_describes_the_run_but_not_its_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setattr(sys, "argv", ["/home/jane/train.py", "--data=/home/jane/data"])
    found = environment(["cpu, 2 cores", "cpu, 2 cores"])
    assert shlex.split(found["command"]) == ["~/train.py", "--data=~/data"]
    assert (found["ranks"], found["devices"]) == (2, ["cpu, 2 cores"])
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["python"] == sys.version.split()[0]
    assert abs(datetime.fromisoformat(found["started"]).timestamp() - time.time()) < 60
    assert 0 < found["memory_gib"] <= round(physical_memory_gib(), 1)
    assert socket.gethostname() not in json.dumps(found)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/home/jane/train.py", "~/train.py"),
        ("--data=/home/jane/my data", "--data=~/my data"),
        ("/mnt/home/jane/x", "/mnt/home/jane/x"),
        ("/home/janet/x", "/home/janet/x"),
    ],
)
def test_the_home_folder_is_not_in_the_command(
    monkeypatch: pytest.MonkeyPatch, typed: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setattr(sys, "argv", ["train.py", typed])
    assert shlex.split(command_line()) == ["train.py", expected]


def test_memory_is_what_the_control_group_grants(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    physical = memory_gib(limit)
    assert physical == pytest.approx(physical_memory_gib(), rel=0.01), "there is no limit file"
    for text, expected in (("max\n", physical), (f"{1 << 60}\n", physical), (f"{1 << 29}\n", 0.5)):
        limit.write_text(text)
        assert memory_gib(limit) == expected


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., str]:
    """Runs git in a repository at `tmp_path`, which has one commit and a tag."""

    def run(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.check_output(command, text=True).strip()

    run("init", "-q")
    (tmp_path / "train.py").write_text("1")
    run("add", "train.py")
    run("commit", "-qm", "one")
    run("tag", "v1")
    return run


def test_the_commit_is_marked_if_tracked_files_have_changed(
    tmp_path: Path, git: Callable[..., str]
) -> None:
    commit = git("rev-parse", "--short=12", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "untracked.py").write_text("1")
    assert git_commit(tmp_path) == commit
    (tmp_path / "train.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_a_folder_within_a_repository_has_no_commit(
    tmp_path: Path, git: Callable[..., str]
) -> None:
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None


def test_without_git_there_is_no_commit(
    tmp_path: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_the_environment_has_the_commit_of_this_checkout() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True)
    commit = environment([])["commit"]
    assert head.startswith(commit.removesuffix("-dirty"))


def test_a_library_that_is_not_installed_has_no_version() -> None:
    assert library_versions(["numpy", "no-such-library"]) == {
        "numpy": metadata.version("numpy"),
        "no-such-library": None,
    }


def test_the_cpu_has_a_name() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    assert cpu_name() in names or cpu_name() == platform.machine()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("700.00, 580.65.06", (700.0, "580.65.06")),
        ("[N/A], 580.65.06", (None, "580.65.06")),
        ("", (None, None)),
    ],
)
def test_gpu_settings_are_those_of_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    expected: tuple[float | None, str | None],
) -> None:
    """nvidia-smi is asked by UUID: its numbers are not those of torch."""

    class Properties:
        uuid = "12-34"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    device = torch.device("cuda:1")
    assert gpu_settings(device) == (None, None), "there is no nvidia-smi"
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-12-34*) echo "$ANSWER";; esac\n')
    command.chmod(0o755)
    monkeypatch.setenv("ANSWER", answer)
    assert gpu_settings(device) == expected
