"""Several processes that torchrun starts, and one alone: the same run, whoever is told to stop and whoever fails."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipeline
from experiment.metrics import read_metrics
from experiment.presets import parse
from experiment.run_folder import PREEMPTED
from tests.helpers.images import write_photos
from tests.helpers.runs import TINY, TRAIN, Command, at_step, ctrl_c, logged_steps, read_summary

OPTIONS = [*TINY, "--epochs", "4", "--lr", "6", "--threads", "1", "--log-steps", "1"]  # 20 steps
AT = 7

# Runs train.py after a line or two of a test's, which may ask for the `rank`.
DRIVER = f"""
import os, pytest, runpy, signal, sys, time
sys.path[:0] = [{str(TRAIN.parent)!r}, {str(Path(__file__).parent)!r}]
rank = os.environ["RANK"]

def at_step(step, action):
    import conftest
    conftest.at_step(pytest.MonkeyPatch(), step, action)

def fail():
    raise KeyError("a bug")

exec(os.environ["HOOK"])
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""
RECORD = """
import pipeline
steps = pipeline.Loader.steps
def recorded(loader, *rest):
    for batch in steps(loader, *rest):
        if loader.shuffle:  # it is not the one of views.png
            with open(f"samples-{rank}", "a") as file:
                print(*batch.samples.tolist(), file=file)
        yield batch
pipeline.Loader.steps = recorded
"""
Torchrun = Callable[..., tuple[int, str]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Torchrun:
    """train.py on two ranks, from an empty folder: (exit status, everything that they and torchrun said)."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "torchrun").mkdir()

    def run(*arguments: object, hook: str = "", options: tuple[str, ...] = ()) -> tuple[int, str]:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            port,
            *options,
        ]
        process = subprocess.run(
            [*command, str(tmp_path / "driver.py"), *map(str, arguments)],
            cwd=tmp_path / "torchrun",
            env=os.environ | {"HOOK": hook, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        return process.returncode, process.stdout

    return run


def tracebacks(text: str) -> list[str]:
    """Those of train.py: torchrun shows its own as well."""
    found = re.split("Traceback \\(most recent call last\\)", text)[1:]
    return [part for part in found if 'train.py", line' in part]


def errors(text: str) -> list[str]:
    return re.findall("^error: (.*)", text, re.MULTILINE)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl")}


def planned(unlabelled: Path) -> list[list[int]]:
    """The samples of each step."""
    loader = pipeline.open_loader(
        pipeline.open_store(unlabelled),
        pipeline.barlow_twins(16),
        pipeline.LoaderOptions(batch_size=8),
    )
    return [sorted(step.samples.tolist()) for step in loader.plan(0, 4 * len(loader))]


def seen(folder: Path) -> list[list[int]]:
    """The samples of each step that the ranks have recorded."""
    ranks = [(folder / f"samples-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert not [line for lines in ranks for line in lines if len(line.split()) != 4], (
        "half the batch on each"
    )
    return [sorted(map(int, f"{a} {b}".split())) for a, b in zip(*ranks, strict=True)]


@pytest.fixture
def whole(train: Command, unlabelled: Path, tmp_path: Path) -> Path:
    """A run of one process that nothing interrupted."""
    status, text = train("--data", unlabelled, *OPTIONS, "--run", tmp_path / "whole")
    assert status == 0, text
    return tmp_path / "whole"


def test_two_ranks_are_one_run_stopped_by_sigterm_and_resumed_on_one(
    torchrun: Torchrun, train: Command, unlabelled: Path, whole: Path, tmp_path: Path
) -> None:
    """The second sees other images in its folder: what there is and how many steps that makes, the first one says."""
    other = write_photos(tmp_path / "other", 48, classes=1)
    hook = f"""{RECORD}
if rank == "1":
    sys.argv[sys.argv.index("--data") + 1] = {str(other)!r}
else:  # to torchrun; and slow enough for it
    at_step({AT}, lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(2)))
"""
    run, options = (
        tmp_path / "run",
        ("--data", unlabelled, *OPTIONS, "--run-folder", tmp_path / "run"),
    )
    status, text = torchrun(*options, hook=hook)
    assert status != 0, text
    assert not errors(text) + tracebacks(text), text
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert AT < step <= AT + 2, "the ranks agree one step later"
    assert f"interrupted after step {step}; --resume goes on from there" in text
    assert (run / "preempted").exists()
    assert not (run / "summary.json").exists()
    assert losses(run)[0] == pytest.approx(losses(whole)[0], rel=1e-5)
    assert losses(run)[3] == pytest.approx(losses(whole)[3], rel=1e-3)
    assert seen(tmp_path / "torchrun")[:step] == planned(unlabelled)[:step]

    status, text = train(*options, "--resume")
    assert status == 0, text
    assert f"resumed after step {step}" in text
    assert not (run / "preempted").exists()
    assert logged_steps(run) == list(range(20))
    assert losses(run)[step] == pytest.approx(losses(whole)[step], rel=1e-3)
    assert read_summary(run)["steps"] == 20


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_on_two_ranks(
    torchrun: Torchrun,
    train: Command,
    unlabelled: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, options = (
        tmp_path / "run",
        ("--data", unlabelled, *OPTIONS, "--run-folder", tmp_path / "run"),
    )
    at_step(monkeypatch, AT, ctrl_c)
    assert train(*options)[0] == 130
    status, text = torchrun(*options, "--resume-if-saved", hook=RECORD)
    assert status == 0, text
    assert not errors(text) + tracebacks(text), text
    for said in (f"resumed after step {AT + 1}", "loss_last"):
        assert text.count(said) == 1, "one rank speaks"
    assert seen(tmp_path / "torchrun") == planned(unlabelled)[AT + 1 :]
    assert logged_steps(run) == list(range(20)), "one rank writes"
    assert losses(run)[AT + 1] == pytest.approx(losses(whole)[AT + 1], rel=1e-3)
    superseded = {f"checkpoint-{AT + 1:08d}.pt"}
    assert {path.name for path in run.iterdir()} - superseded == {
        path.name for path in whole.iterdir()
    }
    assert list(read_summary(run)) == list(read_summary(whole))
    assert not [
        path for path in (tmp_path / "torchrun").iterdir() if not path.name.startswith("samples-")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "options", "preempted"),
    [
        ("if rank == '0': at_step(7, lambda: os.kill(os.getppid(), signal.SIGINT))", (), False),
        (
            "if rank == '0': at_step(7, lambda: os.kill(os.getppid(), signal.SIGUSR1))",
            ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
            True,
        ),
        ("if rank == '1': at_step(7, lambda: os.kill(os.getpid(), signal.SIGUSR1))", (), True),
    ],
    ids=["Ctrl-C", "SIGUSR1", "SIGUSR1 to one rank"],
)
def test_however_ranks_are_told_to_stop_they_save(
    torchrun: Torchrun,
    unlabelled: Path,
    tmp_path: Path,
    told: str,
    options: tuple[str, ...],
    preempted: bool,
) -> None:
    """With a disk so slow that the second rank has ended long before the first has saved."""
    run = tmp_path / "run"
    hook = f"""
fsync = os.fsync
os.fsync = lambda file: (time.sleep(3), fsync(file))
factor = model.learning_rate_factor
model.learning_rate_factor = lambda *rest, **named: (time.sleep(0.2), factor(*rest, **named))[1]
{told}
"""
    status, text = torchrun(
        "--data",
        unlabelled,
        *OPTIONS,
        "--run-folder",
        run,
        hook=f"import model{hook}",
        options=options,
    )
    assert status != 0
    assert not errors(text) + tracebacks(text), text
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert AT < step < 20
    assert text.count(f"interrupted after step {step}; --resume goes on from there") == 1
    assert (run / "preempted").exists() == preempted
    if "getpid" in told:
        assert "exitcode  : 75" in text, "of the first rank, which nobody has hurried"
        assert "closing signal" not in text


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        (1, "fail()"),
        pytest.param(0, "fail()", marks=pytest.mark.slow),
        pytest.param(1, "os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param(0, "os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_all_and_the_first_says_where_to_go_on(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path, rank: int, fault: str
) -> None:
    """Its process gone, torchrun sends SIGTERM to the other, which is not to keep it from saying what it has to say."""
    run, failed_at = tmp_path / "run", tmp_path / "failed"
    action = f"lambda: (open({str(failed_at)!r}, 'w').close(), {fault})"
    hook = f"""
import pipeline
steps = pipeline.Loader.steps
def left_slowly(*rest):
    try:
        yield from steps(*rest)
    finally:
        time.sleep(1.5)
if rank == "{rank}":
    at_step({AT}, {action})
else:
    pipeline.Loader.steps = left_slowly
"""
    status, text = torchrun("--data", unlabelled, *OPTIONS, "--run-folder", run, hook=hook)
    assert status != 0
    assert time.time() - failed_at.stat().st_mtime < 60
    raised = fault == "fail()"
    assert len(tracebacks(text)) == 1, text
    assert len(re.findall("^KeyError: 'a bug'$", text, re.MULTILINE)) == raised, text
    assert sum("KeyError: 'a bug'" in line for line in errors(text)) == raised, text
    if raised or rank == 1:
        place = f"it ended after step {AT}, which is saved in {run / 'checkpoint.pt'}: continue with --resume"
        assert sum(place in line for line in errors(text)) == 1, text
        assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == AT
    assert not (run / "preempted").exists()


@pytest.mark.slow
def test_a_rank_that_fails_before_the_first_step_is_no_reason_to_come_again(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path
) -> None:
    """As one that finds no GPU: torchrun tells the first one to end, as it does where there is a better job."""
    hook = """
import pipeline
if rank == "1":
    pipeline.find_device = lambda *_: (time.sleep(2), fail())  # the other waits for it by then
"""
    status, text = torchrun(
        "--data", unlabelled, *OPTIONS, "--run-folder", tmp_path / "run", hook=hook
    )
    assert status != 0
    assert sum("KeyError: 'a bug'" in line for line in errors(text)) == 1, text
    assert "forcefully" not in text, "SIGTERM has ended the other"
    assert not (tmp_path / "run" / "preempted").exists()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (("--batch-sise", "8"), "Unrecognized options: --batch-sise"),
        (("--batch-size", "9"), "--batch-size is 9: it must be a multiple of the 2 ranks"),
    ],
)
def test_a_mistake_is_said_once(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path, mistake: tuple[str, ...], words: str
) -> None:
    status, text = torchrun(
        "--data", unlabelled, *OPTIONS, "--run-folder", tmp_path / "run", *mistake
    )
    assert status != 0
    assert "forcefully" not in text, "SIGTERM has ended the other"
    assert text.count(words) == 1, text
    assert not tracebacks(text), text
    assert not (tmp_path / "run").exists()


def test_torchrun_takes_none_of_our_options_for_its_own() -> None:
    """Its parser finds the ones that could be short for two of its own ambiguous, even behind the script."""
    from torch.distributed.run import get_args_parser

    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall("--[a-z][a-z-]+", said.getvalue())) - {
        "--run"
    }  # which is there for one process
    assert len(options) > 50
    for option in options:
        assert get_args_parser().parse_args(["train.py", option, "x"]).training_script_args == [
            option,
            "x",
        ]


# ── one process ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_process_that_is_told_to_stop_saves_and_says_how_it_ended(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, options = tmp_path / "run", ("--data", unlabelled, *OPTIONS, "--run", tmp_path / "run")
    at_step(monkeypatch, AT, lambda: os.kill(os.getpid(), number))
    status, text = train(*options)
    assert status == (130 if number == signal.SIGINT else 75), text
    assert f"interrupted after step {AT + 1}; --resume" in text
    assert (run / "preempted").exists() == (status == 75)
    at_step(monkeypatch, AT + 3, ctrl_c)
    assert train(*options, "--resume-if-saved")[0] == 130
    assert not (run / "preempted").exists(), "of the run before"
    assert logged_steps(run) == list(range(AT + 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "place", ["pipeline.open_store", "pipeline.view_grid", "model.export_backbone"]
)
def test_a_signal_outside_the_loop_ends_quietly(
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    place: str,
) -> None:
    run, options = (
        tmp_path / "run",
        ("--data", unlabelled, *OPTIONS, "--epochs", "1", "--run", tmp_path / "run"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_: os.kill(os.getpid(), number))
        status, text = train(*options)
    assert status == 75, text
    assert not errors(text), text
    assert (run / "preempted").exists()
    status, text = train(*options, "--resume-if-saved")
    assert status == 0, text
    assert ("resumed after step 5" in text) == (place == "model.export_backbone")
    assert logged_steps(run) == list(range(5))
    assert not (run / "preempted").exists()


def test_a_real_process_is_told_to_stop_while_it_imports_and_while_it_trains(
    unlabelled: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(TRAIN),
        "--data",
        str(unlabelled),
        *OPTIONS,
        "--epochs",
        "4000",
        "--run",
        str(tmp_path / "r"),
    ]
    for moment in ("imports", "trains"):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            line = ""
            while ("twinfeed" if moment == "imports" else "pretraining") not in line:
                line = process.stdout.readline()
            process.terminate()
            assert process.wait(timeout=60) == PREEMPTED
            assert process.stderr.read() == ""
        assert (tmp_path / "r" / "checkpoint.pt").exists() == (moment == "trains")
