"""What a command prints, at a terminal and without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiment import Console, counted, printable
from tests.helpers.runs import TRAIN


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Console:
    """A console whose output pytest captures, without a terminal."""
    return Console()


def test_a_line_is_printed_as_it_is(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    console.print("[bold]not markup[/bold] " + 200 * "long ")
    assert capsys.readouterr().out == "[bold]not markup[/bold] " + 200 * "long " + "\n"


def test_a_quiet_console_only_prints_rejected_images(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = True
    console.print("hidden")
    console.table({"hidden": 1})
    assert console.print_rejects("left out", {"a\n.jpg": "empty"}) == 1
    assert capsys.readouterr().out == "left out a\\n.jpg: empty\n"
    assert console.quiet


def test_only_ten_rejected_images_are_named_at_a_time(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    rejects = {f"{i}.jpg": "empty" for i in range(13)}
    assert console.print_rejects("left out", rejects) == 13
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out 0.jpg: empty"
    assert lines[9:] == ["left out 9.jpg: empty", "and 3 more"]

    rejects["late.jpg"] = "torn"
    assert console.print_rejects("left out", rejects, printed=13) == 14
    assert capsys.readouterr().out == "left out late.jpg: torn\n"


def test_a_table_has_names_and_values(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    console.table({"loss": 1.23456, "folder": "a\tb"})
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [(name, value.strip()) for name, value in rows] == [
        ("loss", "1.235"),
        ("folder", r"a\tb"),
    ]


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    console: Console, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with console, console.progress_bar("testing") as bar:
        bar(1, 30)
        bar(2, 30)
        now += 11
        bar(3, 30, "loss 5")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "testing 1/30",
        "testing 3/30 loss 5",
    ]


def test_batches_are_counted_once_they_are_used(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress_bar("testing") as bar:
        batches = counted(["a", "b"], 2, bar)
        assert next(batches) == "a"
        assert capsys.readouterr().out == ""
        assert next(batches) == "b"
        assert capsys.readouterr().out.split() == ["testing", "1/2"]


def test_control_characters_in_names_are_spelled_out() -> None:
    assert printable("café.jpg") == "café.jpg"
    assert printable("a\x1b[31m\n.jpg") == r"a\x1b[31m\n.jpg"
    assert printable("\udcff.jpg") == r"\udcff.jpg"


def test_a_command_continues_when_its_output_is_no_longer_read() -> None:
    code = (
        "import sys, time\n"
        "from experiment import Console\n"
        "with Console() as console:\n"
        "    for i in range(50): console.print(str(i)); time.sleep(0.01)\n"
        "    print('trained', file=sys.stderr)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=TRAIN.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == "trained\n"
    assert process.wait() == 0
