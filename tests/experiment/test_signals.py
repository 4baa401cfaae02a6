"""Signals that stop a run, and its exit statuses."""

from __future__ import annotations

import os
import signal

import pytest

from experiment import INTERRUPTED, PREEMPTED, stop_signals
from experiment.signals import exit_on_preemption, ignore_preemption

pytestmark = pytest.mark.usefixtures("signal_handlers")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, INTERRUPTED),
        (signal.SIGTERM, PREEMPTED),
        (signal.SIGUSR1, PREEMPTED),
    ],
)
def test_a_signal_only_asks_the_run_to_stop(number: int, status: int) -> None:
    with stop_signals() as requested_status:
        assert requested_status() == 0
        send(number)
        assert requested_status() == status
    assert (INTERRUPTED, PREEMPTED) == (130, 75)


def test_a_second_ctrl_c_stops_at_once_unless_it_follows_immediately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun sends the Ctrl-C of the terminal a second time."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with stop_signals() as requested_status:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert requested_status() == INTERRUPTED
        now += 2
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_does_not_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with stop_signals() as requested_status:
        send(signal.SIGTERM)
        now += 2
        send(signal.SIGTERM)
        assert requested_status() == PREEMPTED


def test_after_the_block_signals_stop_the_process() -> None:
    with stop_signals():
        pass
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        send(signal.SIGTERM)
    assert end.value.code == PREEMPTED


def test_preemption_exits_with_its_status_or_is_ignored() -> None:
    exit_on_preemption()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(SystemExit) as end:
            send(number)
        assert end.value.code == PREEMPTED
    ignore_preemption()
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
