"""How a command runs: its console, its exit status, and what it prints when it fails."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from .console import Console, printable
from .signals import INTERRUPTED, exit_on_preemption, ignore_preemption

_USER_ERRORS = (ValueError, OSError, FloatingPointError)  # others are defects of this program
_USAGE_ERROR = 2  # exit status of a wrong command line


def is_rank0() -> bool:
    """Whether this process is rank 0 of those that torchrun has started. Only rank 0 logs."""
    return os.environ.get("RANK", "0") == "0"


def set_thread_environment() -> None:
    """Settings of torch's CPU threads and memory. Call it before torch is imported.

    Threads must not spin while they wait, since the decoding threads need those cores. Views lie in
    huge pages. Both were measured (bench/NOTES.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run_command(main: Callable[[Console], int]) -> int:
    """Run `main` and return its exit status; print what fails in one line on the standard error.

    Among several ranks only the first that fails prints the reason. With TWINFEED_TRACEBACK set,
    exceptions are raised.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if not several:
        # Until there is something to save. Among several ranks, torchrun sends SIGTERM to the
        # others where one has failed, and that is no reason to be started again.
        exit_on_preemption()
    console = Console()
    console.quiet = not is_rank0()
    try:
        with console:
            return main(console)
    except Exception as error:
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        if isinstance(error, ConnectionError) and not is_rank0():
            return 1  # the rank that failed prints the reason
        if several and not isinstance(error, _USER_ERRORS):
            traceback.print_exc()  # which rank was it, and where?
        print(f"error: {printable(explain(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        if end.code == _USAGE_ERROR and not is_rank0():
            # Rank 0 still has to print what is wrong; torchrun ends all ranks as soon as one has
            # ended.
            time.sleep(10)
        raise
    finally:
        ignore_preemption()


def explain(error: Exception) -> str:
    """What ended the program and what helps, in one line; then the last note on the exception (see
    `StepSaver`).
    """
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        text = (
            f"out of memory: {text or 'on the host'}; free some, or use options that need less "
            "(a smaller --batch-size, if the command has it)"
        )
    elif not isinstance(error, _USER_ERRORS):
        text = f"{type(error).__name__}: {text} (TWINFEED_TRACEBACK=1 shows where)"
    notes = getattr(error, "__notes__", ())
    return "; ".join([text, *notes[-1:]])
