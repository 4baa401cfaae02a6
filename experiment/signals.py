"""Signals that ask a run to stop, and the exit statuses that answer them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C has stopped, and that has saved."""
PREEMPTED = 75
"""Exit status of a run that SIGTERM or SIGUSR1 has stopped, and that has saved: EX_TEMPFAIL, try
again later.
"""
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SECONDS_UNTIL_SECOND = 1.0


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 only ask the run to stop after the current
    step.

    Yields a function that returns the exit status of the run, or 0 if no signal has arrived. A
    second Ctrl-C stops at once, unless it arrives within a second: torchrun passes on what the
    terminal has sent to all of its processes already.
    """
    status, asked_at = 0, 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal status, asked_at
        again = time.monotonic() - asked_at > _SECONDS_UNTIL_SECOND
        if status and number == signal.SIGINT and again:
            raise KeyboardInterrupt
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        asked_at = time.monotonic()

    before = signal.signal(signal.SIGINT, handle)
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, handle)
    yield lambda: status
    # Not after an exception: torchrun's SIGTERM must not come before the reason is printed.
    signal.signal(signal.SIGINT, before)
    exit_on_preemption()


def exit_on_preemption() -> None:
    """From now on, SIGTERM and SIGUSR1 exit with PREEMPTED: there is nothing to save."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, _exit_preempted)


def ignore_preemption() -> None:
    """From now on, SIGTERM and SIGUSR1 do nothing: the exit status is decided."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit_preempted(number: int, frame: object) -> None:
    sys.exit(PREEMPTED)
