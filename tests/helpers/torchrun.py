"""train.py on two ranks, which torchrun starts, with code that changes what a rank does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.processes import free_port
from tests.helpers.runs import TRAIN

# Runs train.py after the code in the environment variable HOOK, which may use what is defined here.
_DRIVER = f"""
import os, pytest, runpy, signal, sys, time
sys.path.insert(0, {str(TRAIN.parent)!r})
rank = os.environ["RANK"]

def at_step(step, action):
    from tests.helpers import runs
    runs.at_step(pytest.MonkeyPatch(), step, action)

def fail():
    raise KeyError("a bug")

exec(os.environ["HOOK"])
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""

RECORD_SAMPLES = """
import pipeline
steps = pipeline.Loader.steps

def recorded(loader, *arguments):
    for batch in steps(loader, *arguments):
        if loader.options.shuffle:  # not for views.png
            with open(f"samples-{rank}", "a") as file:
                print(*batch.samples.tolist(), file=file)
        yield batch

pipeline.Loader.steps = recorded
"""
"""A hook that writes the samples of each step to a file per rank; see `recorded_samples`."""

Torchrun = Callable[..., tuple[int, str]]
"""Runs train.py on two ranks; returns torchrun's exit status, and what all processes printed.

Keyword arguments: `hook`, Python code that each rank runs first, and `options` of torchrun.
"""


def torchrun_in(folder: Path) -> Torchrun:
    """Runs train.py on two ranks in the folder `torchrun`, which is created in `folder`."""
    driver = folder / "driver.py"
    driver.write_text(_DRIVER)
    work = folder / "torchrun"
    work.mkdir()

    def run(*arguments: object, hook: str = "", options: tuple[str, ...] = ()) -> tuple[int, str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        torchrun += ["--master-port", str(free_port()), *options]
        process = subprocess.run(
            [*torchrun, str(driver), *map(str, arguments)],
            cwd=work,
            env=os.environ | {"HOOK": hook, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        return process.returncode, process.stdout

    return run


def tracebacks(text: str) -> list[str]:
    """The tracebacks of train.py. Those of torchrun itself are left out."""
    parts = re.split("Traceback \\(most recent call last\\)", text)[1:]
    return [part for part in parts if 'train.py", line' in part]


def errors(text: str) -> list[str]:
    return re.findall("^error: (.*)", text, re.MULTILINE)


def recorded_samples(work: Path) -> list[list[int]]:
    """The samples of each step, of both ranks together, that `RECORD_SAMPLES` has written."""
    ranks = [(work / f"samples-{rank}").read_text().splitlines() for rank in (0, 1)]
    half_a_batch = {len(line.split()) for lines in ranks for line in lines}
    assert half_a_batch == {4}
    return [sorted(map(int, f"{a} {b}".split())) for a, b in zip(*ranks, strict=True)]
