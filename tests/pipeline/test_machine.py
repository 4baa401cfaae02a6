"""Worker threads: each runs torch on one thread, and no other thread notices."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pipeline import FOR_ANY_STORE, open_store
from pipeline.machine import single_threaded_workers
from tests.helpers.loaders import loader_of


def threads_of_torch() -> tuple[int, int]:
    """torch's number of threads in this thread, and in a new one."""
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), elsewhere[0]


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_number_of_threads_of_torch_does_not_change(photos: Path, decoder: str) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = loader_of(open_store(photos), decoder=decoder)
        for _ in loader.epoch(0):
            assert threads_of_torch() == (3, 3)
        assert threads_of_torch() == (3, 3)
    finally:
        torch.set_num_threads(usual)


def test_workers_run_torch_on_one_thread() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_threaded_workers(2, "test") as pool:
            assert [pool.submit(torch.get_num_threads).result() for _ in range(8)] == [1] * 8
    finally:
        torch.set_num_threads(usual)


def test_concurrent_pools_do_not_change_the_number_of_threads_of_torch() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(15):
            together = threading.Barrier(4)

            def begin(together: threading.Barrier = together) -> None:
                together.wait()
                single_threaded_workers(2, "test").shutdown()

            threads = [threading.Thread(target=begin) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert threads_of_torch() == (3, 3)
    finally:
        torch.set_num_threads(usual)


def test_started_workers_end_if_no_more_threads_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_threads = torch.get_num_threads()
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="start new thread"):
        single_threaded_workers(4, "few")
    assert len(started) == 2
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert torch.get_num_threads() == torch_threads
    monkeypatch.undo()
    single_threaded_workers(4, "enough").shutdown()
