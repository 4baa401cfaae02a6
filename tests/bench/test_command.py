"""`python -m bench`: what a run measures and records, bad options, and several ranks."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import pipeline
from bench import options, record
from bench.record import Record
from bench.resource_bounds import CORES, DISK
from bench.stage_names import (
    COLD,
    DECODE,
    DISTORT,
    E2E,
    FEED,
    ONE_CORE,
    PLAN,
    STEP,
    TWO_CROPS,
    WARM,
)
from experiment import PRESETS, DecoderName, provenance
from tests.bench.conftest import Bench
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.libraries import import_or_skip
from tests.helpers.processes import run_two_ranks
from tests.helpers.runs import assert_refused

ROOT = Path(__file__).parents[2]
STAGES = [PLAN, COLD, WARM, DECODE, TWO_CROPS, DISTORT, FEED, STEP, E2E]
TINY = ["--device", "cpu", "--size", "24", "--quick"]


def measure(bench: Bench, folder: Path, *more: object) -> tuple[Record, str]:
    """Run the benchmark on a folder; return its record and everything it printed."""
    path = folder.parent / "record.json"
    status, text = bench(*TINY, "--data", folder, "--json", path, *more)
    assert status == 0, text
    return record.read(path), text


def check_run(result: Record, text: str) -> None:
    """What every run promises."""
    check_stages(result)
    cores_seconds = seconds_on_cores(result)
    assert result.bounds == {CORES: pytest.approx(1 / cores_seconds)}
    assert "Limited by " in result.verdict[0]
    assert all(stage.name in text for stage in result.stages)
    assert all(sentence in text for sentence in result.verdict)
    assert result.versions["torch"] == torch.__version__.partition("+")[0]
    assert result.machine.cores == pipeline.usable_cores()
    assert result.machine.gpu is None
    assert result.commit == (provenance.git_commit() or "unknown")


def check_stages(result: Record) -> None:
    names = [stage.name for stage in result.stages]
    assert [name for name in names if name != ONE_CORE] == STAGES
    measures_one_core = result.settings["threads"] > 1 and result.settings["ranks"] == 1
    assert (ONE_CORE in names) == measures_one_core
    for stage in result.stages:
        assert len(stage.rates.images_per_s) == 2
        assert all(rate > 0 for rate in stage.rates.images_per_s)
        if stage.name not in (PLAN, DECODE, ONE_CORE):
            assert stage.roofline
            assert stage.roofline_name


def seconds_on_cores(result: Record) -> float:
    """The seconds of an image on a CPU, summed over the stages that share the cores."""
    rates = {stage.name: stage.rates.median for stage in result.stages}
    threads = result.settings["threads"]
    shared = (WARM, TWO_CROPS, DISTORT, STEP)
    return 1 / rates[PLAN] / threads + sum(1 / rates[name] for name in shared)


def stage_of(result: Record, name: str) -> record.StageResult:
    return next(stage for stage in result.stages if stage.name == name)


def test_every_stage_is_measured_recorded_and_printed(bench: Bench, forty: Path) -> None:
    result, text = measure(bench, forty, "--no-peers")
    check_run(result, text)
    assert result.peers == []
    assert result.data.name == "images of forty"
    assert result.data.images == 40
    sizes = [path.stat().st_size for path in forty.rglob("*.jpg")]
    assert result.data.mean_bytes == pytest.approx(np.mean(sizes))
    assert result.settings["batch_size"] == 32
    assert str(forty.parent) not in (forty.parent / "record.json").read_text()
    assert stage_of(result, DECODE).roofline_name == "bare libjpeg-turbo"


def test_fewer_images_than_a_batch_with_peers(bench: Bench, tmp_path: Path) -> None:
    result, text = measure(bench, write_photos(tmp_path / "few", 9))
    check_run(result, text)
    assert result.settings["batch_size"] == result.data.images == 9
    assert {peer.name for peer in result.peers} > {"authors' transform (Pillow)", "twinfeed, cpu"}
    assert all(peer.name in text for peer in result.peers)


def test_other_formats_and_broken_files(bench: Bench, forty: Path) -> None:
    (forty / "class0" / "0.png").write_bytes(encoded(picture(60, 50), "PNG"))
    (forty / "class0" / "1.webp").write_bytes(encoded(picture(60, 50), "WebP"))
    (forty / "class0" / "0000.jpg").write_bytes(b"no image")
    whole = (forty / "class1" / "0001.jpg").read_bytes()
    (forty / "class1" / "0001.jpg").write_bytes(whole[: len(whole) // 2])
    (forty / "class2" / "cmyk.jpg").write_bytes(encoded(picture(60, 50, mode="CMYK")))
    result, text = measure(bench, forty)
    check_run(result, text)
    assert result.data.images == 42
    assert "left out class0/0000.jpg" in text
    (replaced,) = [line for line in text.splitlines() if line.startswith("replaced ")]
    assert "0001.jpg: truncated or damaged" in replaced
    decode = stage_of(result, DECODE)  # bare JPEG decoding is no roofline for a PNG
    assert (decode.roofline, decode.roofline_name) == (None, "")
    assert result.peers[0].ratio == 1


def test_stages_with_dali(bench: Bench, forty: Path) -> None:
    import_or_skip("nvidia.dali")
    result, text = measure(bench, forty, "--decoder", "dali", "--no-peers", "--threads", 1)
    check_run(result, text)
    assert result.settings["decoder"] == "dali"


def test_data_larger_than_the_memory_are_bounded_by_the_disk(
    bench: Bench, forty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "memory_gib", lambda: 1e-6)
    result, _ = measure(bench, forty, "--no-peers")
    assert result.bounds.keys() == {CORES, DISK}
    assert result.bounds[DISK] == pytest.approx(stage_of(result, COLD).rates.median)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all", "is not there"]),
        (["--images", "1"], ["--images is 1", "at least 2"]),
        (["--batch-size", "1"], ["--batch-size is 1", "at least 2"]),
        (["--size", "0"], ["--size is 0"]),
        (["--threads", "0"], ["--threads is 0"]),
        (["--device", "tpu"], ["'tpu'", "cuda:N"]),
        (["--json", "/nowhere/at/all.json"], ["/nowhere/at/all.json", "existing folder"]),
        (["--json", "/"], ["--json is /", "existing folder"]),
    ],
)
def test_bad_options_are_refused_in_one_line(
    bench: Bench, arguments: list[str], words: list[str]
) -> None:
    assert_refused(bench("--quick", *arguments), *words)


def test_too_few_images_are_refused(bench: Bench, tmp_path: Path) -> None:
    assert_refused(
        bench(*TINY, "--data", write_photos(tmp_path / "one", 1)),
        "at least 2 images are needed, found 1",
    )


def test_images_that_do_not_decode_are_refused(bench: Bench, tmp_path: Path) -> None:
    for path in write_photos(tmp_path / "torn", 3).rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-400])
    assert_refused(
        bench(*TINY, "--data", tmp_path / "torn"), "none of the first", "can be decoded", "0000.jpg"
    )


def test_options_offer_every_decoder_and_preset() -> None:
    hints = get_type_hints(options.BenchOptions)
    assert hints["decoder"] == DecoderName
    assert set(get_args(DecoderName)) >= {"auto", *pipeline.DECODERS}
    assert set(get_args(get_args(hints["preset"])[0])) == set(PRESETS)


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["doctor", "--help"]])
def test_help_is_printed_before_torch_is_loaded(arguments: list[str]) -> None:
    code = (
        "import sys; from bench.__main__ import main; from experiment import Console\n"
        f"try: main({arguments}, Console())\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "usage: python -m bench" in done.stdout
    assert "type: ignore" not in done.stdout


# Under torchrun


def check_two_ranks(done: subprocess.CompletedProcess[str], path: Path) -> Record:
    assert done.returncode == 0, done.stderr
    result = record.read(path)
    assert [stage.name for stage in result.stages] == STAGES
    for stage in result.stages:
        assert len(stage.ranks) == 2
        assert stage.rates == stage.ranks[0]
        assert stage.total == sum(statistics.median(rank.images_per_s) for rank in stage.ranks)
        assert stage.alone is not None
        assert stage.contention == pytest.approx(1 - stage.total / 2 / stage.alone.median)
        assert stage.contention < 1
    assert any(stage.ranks[0] != stage.ranks[1] for stage in result.stages)
    assert result.settings["ranks"] == 2
    assert result.command.startswith("torchrun --nproc-per-node 2 -m bench")
    check_one_rank_printed(done.stdout)
    return result


def check_one_rank_printed(text: str) -> None:
    assert text.count("2 ranks in total") == 1
    assert text.count("roofline reached") == 1
    assert text.count("written to") == 1
    # One row in the table of stages, and one in the table of ranks.
    assert sum(line.startswith("cold read") for line in text.splitlines()) == 2


@pytest.mark.slow
def test_two_ranks_share_figures_and_only_rank_0_prints(forty: Path, tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import experiment\n"
        "from bench import __main__, stage_benchmark\n"
        "from bench.timing import Repeats\n"
        "stage_benchmark.QUICK = Repeats(0.01, 2)\n"
        "sys.exit(experiment.run_command(lambda c: __main__.main(sys.argv[1:], c)))\n"
    )
    path = tmp_path / "ranks.json"
    done = run_two_ranks(str(script), *TINY, "--data", str(forty), "--json", str(path))
    result = check_two_ranks(done, path)
    assert result.verdict[0].startswith("On each of 2 ranks, while all of them work: ")


@pytest.mark.slow
def test_two_ranks_with_repeats_of_full_length(forty: Path, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    done = run_two_ranks("-m", "bench", *TINY, "--data", str(forty), "--json", str(path))
    result = check_two_ranks(done, path)
    assert all(len(stage.ranks[1].images_per_s) == 3 for stage in result.stages)


# Whole runs


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
def test_a_quick_run_takes_about_a_minute_and_no_stage_exceeds_its_roofline(
    tmp_path: Path,
) -> None:
    """Processor time, which unlike elapsed time does not depend on the load of the machine."""
    path = tmp_path / "a.json"
    command = [sys.executable, "-m", "bench", "--quick", "--device", "cpu", "--json", str(path)]
    before = cpu_seconds_of_children()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    minute_and_drawing = 60 + 15
    assert cpu_seconds_of_children() - before < minute_and_drawing * pipeline.usable_cores()
    for stage in record.read(path).stages:
        if stage.roofline is None:
            continue
        # A sum of several stages collects the noise of a shared machine.
        tolerance = 1.5 if stage.roofline_name == "its parts in sequence" else 1.2
        assert stage.rates.median < tolerance * stage.roofline, stage.name


@pytest.mark.slow
@pytest.mark.parametrize("wait", [1.0, 14.0, 20.0])  # while torch is loaded, and amid the stages
def test_ctrl_c_ends_a_run_at_once_and_leaves_no_process_behind(forty: Path, wait: float) -> None:
    bench = [sys.executable, "-m", "bench", "--device", "cpu", "--data", str(forty)]
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *bench, "--size", "24"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    with pytest.raises(ProcessLookupError):  # its process group is empty
        os.killpg(process.pid, 0)
