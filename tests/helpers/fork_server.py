"""Starts train.py in a hundredth of a second: a server imports everything once, and forks for each
run.

`fork_server` is for tests. The rest of the file runs in the server's process.
"""

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
from typing import IO, Any

ROOT = Path(__file__).parents[2]


class Run:
    """A run of train.py in another process."""

    def __init__(self, pid: int, output: Path, server: ForkServer) -> None:
        self.pid = pid
        self._output = output
        self._server = server

    def kill(self) -> None:
        """Kill the process, if it is still running.

        Its process id is not given to another process before `wait` was called.
        """
        os.kill(self.pid, signal.SIGKILL)

    def is_running(self) -> bool:
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2]
        return after_name.split()[0] != "Z"

    def wait(self) -> int:
        """Wait for the end; return the exit status, or minus the signal that ended it."""
        return int(self._server.request("wait"))

    def text(self) -> str:
        """Everything that it has printed."""
        return self._output.read_text()


class ForkServer:
    """Call it with the arguments of train.py, after the previous run has been waited for."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.folder = folder
        self._requests: IO[str] = process.stdin
        self._answers: IO[str] = process.stdout

    def __call__(self, *arguments: object, slow_disk_s: float = 0, killed_at: int = 0) -> Run:
        """Start train.py in `folder`.

        Args:
            arguments: Those of train.py.
            slow_disk_s: Seconds that are added to each write, renaming and deletion of a file.
            killed_at: The run kills itself before its nth change of the folder `run`; 0: never.
        """
        output = self.folder / "output"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "slow_disk_s": slow_disk_s,
            "killed_at": killed_at,
            "output": str(output),
        }
        pid = int(self.request(json.dumps(request)))
        return Run(pid, output, self)

    def request(self, line: str) -> str:
        print(line, file=self._requests, flush=True)
        return self._answers.readline()


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """Start a server whose runs start in `folder`."""
    # A fork copies only one thread, so the server must have no others, including OpenBLAS's.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    ) as process:
        try:
            yield ForkServer(process, folder)
        finally:
            process.kill()


# The process of the server


def serve() -> None:
    """Answer each request with the process id of a run, and each "wait" with its exit status."""
    import_everything()
    for line in sys.stdin:
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads at a fork"
        pid = os.fork()
        if pid == 0:
            run_train(json.loads(line))
        print(pid, flush=True)
        assert sys.stdin.readline() == "wait\n"
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def import_everything() -> None:
    """Load what a run needs, so that each fork has it already."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import model  # noqa: F401
    import train  # noqa: F401
    from experiment.presets import parse
    from pipeline import barlow_twins, distort, draw

    parse([])  # imports parts of tyro
    # A first batch loads the compiled kernels.
    sample = np.zeros(1, np.int64)
    size = np.full(1, 16)
    params = draw.draw(barlow_twins(16), 0, 0, sample, size, size)
    crops = torch.zeros(2, 1, 16, 16, 3, dtype=torch.uint8)
    distort.distort(crops, params, barlow_twins(16))


def run_train(request: dict[str, Any]) -> None:
    """Run train.py in this process, which is a fresh fork, and exit."""
    import experiment
    import train
    from experiment.presets import parse

    redirect_output(request["output"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if request["slow_disk_s"]:
        slow_down_disk(request["slow_disk_s"])
    if request["killed_at"]:
        kill_before_change(request["killed_at"])

    sys.argv = [str(ROOT / "train.py"), *request["arguments"]]
    status = experiment.run_command(lambda console: train.main(*parse(), console))
    sys.stdout.flush()
    os._exit(status)  # an orderly exit takes torch a second, in which nothing is written


def redirect_output(path: str) -> None:
    """Write what this process prints to a file, and give it an empty standard input."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def slow_down_disk(seconds: float) -> None:
    import model.checkpoint

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, delayed(getattr(os, name), seconds))
    # About 400 writes per file.
    writer = model.checkpoint._HashingWriter
    writer.write = delayed(writer.write, seconds / 100)  # type: ignore[method-assign]


def delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **options)

    return call


def kill_before_change(nth: int) -> None:
    """Kill this process right before its nth change of files in a folder `run`."""
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Python calls this before each operation on files."""
        is_change = event in ("os.rename", "os.remove", "os.mkdir")
        if event == "open":
            is_change = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_change and "run" in Path(os.fsdecode(arguments[0])).parts and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
