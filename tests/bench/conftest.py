"""`python -m bench` in this process, and photographs to measure with."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import rooflines, stage_benchmark
from bench.timing import Repeats
from tests.helpers.images import write_photos

Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats of the stages and of the rooflines take a moment."""
    monkeypatch.setattr(stage_benchmark, "QUICK", Repeats(seconds=0.01, count=2))
    monkeypatch.setattr(rooflines, "_SECONDS", 0.0)


@pytest.fixture
def bench(
    short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Bench]:
    """`python -m bench` in this process: returns its exit status and everything it printed."""
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)
    threads = torch.get_num_threads()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in signals}

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("bench", run_name="__main__")
        printed = capsys.readouterr()
        text = printed.out + printed.err
        assert "Traceback" not in text
        status: Any = end.value.code or 0
        return status, text

    yield start
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    """A folder of 40 JPEGs."""
    return write_photos(tmp_path / "forty", 40)
