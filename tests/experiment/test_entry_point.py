"""How a command ends: its exit status, and the line that says what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from experiment import (
    INTERRUPTED,
    Console,
    explain,
    is_rank0,
    run_command,
    set_thread_environment,
)

LESS_MEMORY = (
    "free some, or use options that need less (a smaller --batch-size, if the command has it)"
)

pytestmark = pytest.mark.usefixtures("signal_handlers", "one_process")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a command that torchrun has not started."""
    for name in ("RANK", "WORLD_SIZE", "TWINFEED_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def raising(error: BaseException) -> Callable[[Console], int]:
    def main(console: Console) -> int:
        raise error

    return main


def test_the_exit_status_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda console: 7) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("x.jpg is empty: remove it\nmore"), "x.jpg is empty: remove it"),
        (FileNotFoundError(2, "No such file", "x\n.jpg"), r"[Errno 2] No such file: 'x\n.jpg'"),
        (KeyError("size"), "KeyError: 'size' (TWINFEED_TRACEBACK=1 shows where)"),
        (
            MemoryError(),
            f"out of memory: on the host; {LESS_MEMORY}",
        ),
        (
            RuntimeError("CUDA out of memory. Tried"),
            f"out of memory: CUDA out of memory. Tried; {LESS_MEMORY}",
        ),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    assert run_command(raising(error)) == 1
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_the_last_note_of_an_error_is_printed() -> None:
    error = ValueError("the loss is nan")
    error.add_note("first")
    error.add_note("saved at step 5")
    assert explain(error) == "the loss is nan; saved at step 5"


def test_tracebacks_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINFEED_TRACEBACK", "1")
    with pytest.raises(ValueError, match="empty"):
        run_command(raising(ValueError("empty")))


def test_ctrl_c_has_its_own_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_only_rank_0_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(console: Console) -> int:
        console.print("hello")
        return 0

    assert is_rank0()
    run_command(main)
    assert capsys.readouterr().out == "hello\n"

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_rank0()
    run_command(main)
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_lost_the_others_fails_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(raising(ConnectionResetError("peer"))) == 1
    assert capsys.readouterr() == ("", "")


def test_a_defect_on_one_of_several_ranks_has_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(raising(KeyError("size"))) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: KeyError")


def test_the_thread_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that it is put back after the test
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    set_thread_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
