"""Starts train.py in a hundredth of the time: a process that has imported everything, and is forked for each run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WRITING = os.O_WRONLY | os.O_RDWR


class Run:
    """A run that goes on beside the test, with all that it says in `said`."""

    def __init__(self, pid: int, said: Path, answers: Any) -> None:
        self.pid, self.said, self._answers, self._status = pid, said, answers, ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Nothing where it has ended: until it is asked for in `wait`, its number is given to no other process."""
        os.kill(self.pid, number)

    def going_on(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self) -> int:
        """The exit status, or minus the signal that ended it."""
        print("wait", file=self._answers[0], flush=True)
        return int(self._answers[1].readline())

    def text(self) -> str:
        return self.said.read_text()


class ForkServer:
    """Call it with the arguments of train.py, once the run before has been waited for."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._pipes, self.folder = (process.stdin, process.stdout), folder

    def __call__(self, *arguments: object, slow_disk_s: float = 0, killed_at: int = 0) -> Run:
        """slow_disk_s: so much longer each file takes to be written, to be put in its place, and to be removed.

        killed_at: it kills itself before its nth change of what there is in its folder `run`; 0: never.
        """
        request = {
            "arguments": [*map(str, arguments)],
            "slow_disk_s": slow_disk_s,
            "killed_at": killed_at,
        }
        request["said"] = str(self.folder / "said")
        print(json.dumps(request), file=self._pipes[0], flush=True)
        return Run(int(self._pipes[1].readline()), self.folder / "said", self._pipes)


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """One whose runs start in `folder`. Forking copies one thread: the server has no other, OpenBLAS's neither."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment
    ) as process:
        try:
            yield ForkServer(process, folder)
        finally:
            process.kill()


def slowly(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*rest: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*rest, **named)

    return slow


def kill_at(nth: int) -> None:
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Python calls it before the operation."""
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and arguments[2] & WRITING
        )
        if changes and "run" in Path(os.fsdecode(arguments[0])).parts and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import experiment
    import model
    import train
    from experiment.presets import parse
    from pipeline import barlow_twins, distort, recipe

    parse([])  # and what it imports
    one = np.ones(1, np.int64)  # loads the compiled kernel
    params = recipe.draw(barlow_twins(16), 0, 0, one, 16 * one, 16 * one)
    distort.distort(torch.zeros(2, 1, 16, 16, 3, dtype=torch.uint8), params, barlow_twins(16))
    for line in sys.stdin:
        request = json.loads(line)
        tasks = os.listdir("/proc/self/task")
        assert len(tasks) == 1, f"{len(tasks)} threads at a fork"
        pid = os.fork()
        if pid == 0:
            break
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        return
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, instead in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(instead, number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    if seconds := request["slow_disk_s"]:
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, slowly(getattr(os, name), seconds))
        model.checkpoint._Archive.write = slowly(
            model.checkpoint._Archive.write, seconds / 100
        )  # about 400 a file
    if nth := request["killed_at"]:
        kill_at(nth)
    sys.argv = [str(ROOT / "train.py"), *request["arguments"]]
    status = experiment.run_command(lambda log: train.main(*parse(), log))
    sys.stdout.flush()
    os._exit(status)  # torch takes a second to be taken apart, in which nothing happens


if __name__ == "__main__":
    serve()
