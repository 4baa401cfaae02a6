"""Two ranks under torchrun are one run: the same batches, one output, and it can be resumed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import pipeline
from experiment.metrics import read_metrics
from experiment.presets import parse
from tests.helpers.images import write_photos
from tests.helpers.runs import (
    TINY,
    Command,
    at_step,
    ctrl_c,
    logged_steps,
    read_summary,
    saved_step,
)
from tests.helpers.torchrun import (
    RECORD_SAMPLES,
    Torchrun,
    errors,
    recorded_samples,
    tracebacks,
)

OPTIONS = [*TINY, "--epochs", "4", "--lr", "6", "--threads", "1", "--log-steps", "1"]  # 20 steps
STOP_STEP = 7  # the step in which a run is stopped


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl")}


def planned_samples(folder: Path) -> list[list[int]]:
    """The samples of each step of the run, according to the loader's plan."""
    store = pipeline.open_store(folder)
    options = pipeline.LoaderOptions(batch_size=8)
    loader = pipeline.open_loader(store, pipeline.barlow_twins(16), options)
    return [sorted(step.samples.tolist()) for step in loader.plan(0, 4 * len(loader))]


@pytest.fixture
def uninterrupted(train: Command, unlabelled: Path, tmp_path: Path) -> Path:
    """The folder of a run of one process that was not interrupted."""
    run = tmp_path / "uninterrupted"
    status, text = train("--data", unlabelled, *OPTIONS, "--run-folder", run)
    assert status == 0, text
    return run


def test_two_ranks_stopped_by_sigterm_can_be_resumed_by_one_process(
    torchrun: Torchrun, train: Command, unlabelled: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Rank 1 is given another folder of images: only that of rank 0 counts."""
    run = tmp_path / "run"
    options = ("--data", unlabelled, *OPTIONS, "--run-folder", run)
    other_images = write_photos(tmp_path / "other", 48, classes=1)
    hook = f"""{RECORD_SAMPLES}
if rank == "1":
    sys.argv[sys.argv.index("--data") + 1] = {str(other_images)!r}
else:  # SIGTERM to torchrun, which passes it on while this rank sleeps
    at_step({STOP_STEP}, lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(2)))
"""
    status, text = torchrun(*options, hook=hook)
    assert status != 0, text
    assert not errors(text) + tracebacks(text), text
    step = saved_step(run)
    assert STOP_STEP < step <= STOP_STEP + 2, "the ranks agree to stop one step later"
    assert f"interrupted after step {step}; use --resume to continue" in text
    assert (run / "preempted").exists()
    assert not (run / "summary.json").exists()
    assert losses(run)[0] == pytest.approx(losses(uninterrupted)[0], rel=1e-5)
    assert losses(run)[3] == pytest.approx(losses(uninterrupted)[3], rel=1e-3)
    assert recorded_samples(tmp_path / "torchrun")[:step] == planned_samples(unlabelled)[:step]

    status, text = train(*options, "--resume")
    assert status == 0, text
    assert f"resumed after step {step}" in text
    assert not (run / "preempted").exists()
    assert logged_steps(run) == list(range(20))
    assert losses(run)[step] == pytest.approx(losses(uninterrupted)[step], rel=1e-3)
    assert read_summary(run)["steps"] == 20


@pytest.mark.slow
def test_a_run_of_one_process_can_be_resumed_by_two_ranks(
    torchrun: Torchrun,
    train: Command,
    unlabelled: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    work = tmp_path / "torchrun"
    options = ("--data", unlabelled, *OPTIONS, "--run-folder", run)
    at_step(monkeypatch, STOP_STEP, ctrl_c)
    assert train(*options)[0] == 130
    step = STOP_STEP + 1
    status, text = torchrun(*options, "--resume-if-saved", hook=RECORD_SAMPLES)
    assert status == 0, text
    assert not errors(text) + tracebacks(text), text

    # Only rank 0 prints and writes.
    for words in (f"resumed after step {step}", "loss_last"):
        assert text.count(words) == 1
    assert logged_steps(run) == list(range(20))
    assert recorded_samples(work) == planned_samples(unlabelled)[step:]
    assert losses(run)[step] == pytest.approx(losses(uninterrupted)[step], rel=1e-3)

    # The files are those of one process, and the checkpoint that the run was resumed from.
    names = {path.name for path in run.iterdir()} - {f"checkpoint-{step:08d}.pt"}
    assert names == {path.name for path in uninterrupted.iterdir()}
    assert list(read_summary(run)) == list(read_summary(uninterrupted))
    assert not [path for path in work.iterdir() if not path.name.startswith("samples-")]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (("--batch-sise", "8"), "Unrecognized options: --batch-sise"),
        (("--batch-size", "9"), "--batch-size is 9: it must be a multiple of the 2 ranks"),
    ],
)
def test_a_mistake_on_the_command_line_is_printed_once(
    torchrun: Torchrun, unlabelled: Path, tmp_path: Path, mistake: tuple[str, ...], words: str
) -> None:
    run = tmp_path / "run"
    status, text = torchrun("--data", unlabelled, *OPTIONS, "--run-folder", run, *mistake)
    assert status != 0
    assert "forcefully" not in text, "SIGTERM must end the other rank"
    assert text.count(words) == 1, text
    assert not tracebacks(text), text
    assert not run.exists()


def test_torchrun_passes_on_all_of_our_options() -> None:
    """Its parser rejects options that could be short for two of its own, even behind the script.

    (`--run` is such an option, which is why it is now `--run-folder`.)
    """
    from torch.distributed.run import get_args_parser

    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall("--[a-z][a-z-]+", help_text.getvalue())) - {"--run"}
    assert len(options) > 50
    for option in options:
        parsed = get_args_parser().parse_args(["train.py", option, "x"])
        assert parsed.training_script_args == [option, "x"]
