"""convert.py as a command: its output and refusals, training on the results, Dask, and kills."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from pipeline import FORMATS, open_store
from pipeline.conversion.journal import read_journal
from tests.helpers.conversions import TARGETS, files_in
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.processes import ROOT
from tests.helpers.runs import TINY, Command, assert_refused, ctrl_c, read_summary

CONVERT = [sys.executable, str(ROOT / "convert.py")]

# Training on what was converted


@pytest.mark.parametrize("format", FORMATS)
def test_converted_folder_can_be_trained_on(
    convert: Command, train: Command, photos: Path, tmp_path: Path, format: str
) -> None:
    target = tmp_path / TARGETS[format]
    options = [] if format == "beton" else ["--format", format]
    status, text = convert(photos, target, *options)
    assert status == 0, text
    assert re.search(r"images +60 *\n +passed through +60 *\n", text)
    assert re.search(r"time +[\d.]+ s, [\d,]+ images/s, \d+ MB/s", text)
    assert f"uv run train.py --data {target}" in text

    run = tmp_path / "run"
    status, text = train("--data", target, "--epochs", "1", *TINY, "--run", run)
    assert status == 0, text
    assert "54 images, 6 steps" in text  # a tenth is held out
    assert read_summary(run)["knn_top1_trained"] is not None


def test_losses_are_the_same_for_every_format(
    convert: Command, train: Command, photos: Path, tmp_path: Path
) -> None:
    """Order, labels and views are the same, so losses agree to the bit."""
    losses = []
    for format in FORMATS:
        target = tmp_path / format / TARGETS[format]
        run = tmp_path / f"run-{format}"
        target.parent.mkdir()
        assert convert(photos, target, "--format", format)[0] == 0
        assert train("--data", target, "--epochs", "1", *TINY, "--run", run)[0] == 0
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] == losses[2]


def test_train_and_val_betons_in_one_folder_are_splits(
    convert: Command, train: Command, photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    run = tmp_path / "run"
    for split in ("train", "val"):
        assert convert(photos, data / f"{split}.beton")[0] == 0
    status, text = train("--data", data, "--epochs", "1", *TINY, "--run", run)
    assert status == 0, text
    assert "60 images, 7 steps" in text
    assert read_summary(run)["knn_top1_trained"] is not None


# Output


def test_treatments_and_rejects_are_printed(convert: Command, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 10, classes=1)
    (source / "class0" / "bad\n.jpg").write_bytes(b"no image")
    (source / "class0" / "a.png").write_bytes(encoded(picture(30, 20), "PNG"))
    (source / "class0" / "big.jpg").write_bytes(encoded(picture(500, 20), quality=80))
    command = [source, tmp_path / "x.beton", "--max-side", "200", "--quality", "85"]
    status, text = convert(*command)
    assert status == 0, text
    for name, value in (
        ("images", 12),
        ("re-encoded at lower quality", 10),
        ("converted to JPEG", 1),
        ("resized", 1),
        ("left out", "1, see x.beton.rejects.jsonl"),
    ):
        assert re.search(rf"{name} +{value} *\n", text), (name, text)
    (line,) = (tmp_path / "x.beton.rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["name"].endswith("bad\n.jpg")

    status, text = convert(*command)
    assert status == 0
    assert "nothing to do" in text


def test_control_characters_in_names_are_escaped(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    target = tmp_path / "my \x1b[31m.beton"
    text = convert(photos, target)[1] + convert("verify", target)[1]
    escaped = f"{tmp_path}/my \\x1b[31m.beton"
    assert f"uv run train.py --data '{escaped}'\n" in text
    assert f"{escaped}: no problem" in text
    target.write_bytes(b"")
    status, text = convert("verify", target)
    assert status == 1
    assert "\x1b" not in text


def test_verify_prints_problems_and_fails_if_there_are_any(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x"
    assert convert(photos, target, "--format", "webdataset", "--shards", "2")[0] == 0
    status, text = convert("verify", target, "--against", photos)
    assert (status, text.splitlines()[-1]) == (0, f"{target}: no problem")

    shard = target / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    row = open_store(target).index[45]
    data[row["offset"] + row["bytes"] // 2] ^= 1
    shard.write_bytes(data)
    status, text = convert("verify", target)
    assert status == 1
    assert "it is not what was written: its checksum differs" in text
    assert text.splitlines()[-1] == f"{target}: 1 problem"


def test_refusals_are_one_line(convert: Command, photos: Path, tmp_path: Path) -> None:
    beton = tmp_path / "x.beton"
    assert_refused(convert(tmp_path / "nothing", beton), "nothing", "does not exist")
    formats = "beton, webdataset, tfrecord"
    assert_refused(convert(photos, tmp_path / "x"), "is not known from its name", formats)
    assert_refused(convert(photos, beton, "--quality", "101"), "101", "at most 100")
    assert_refused(convert(photos, beton, "--threads", "-3"), "--threads is -3", "at least 1")
    assert_refused(convert("verify", photos), "contains no beton, WebDataset or TFRecord data")

    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    splits = convert(tmp_path / "data", beton)
    assert_refused(splits, "train/ and val/", "convert each separately")

    beton.write_bytes(b"precious")
    assert_refused(convert(photos, beton), "already exists", "move it, or choose another")
    assert beton.read_bytes() == b"precious"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("x.beton.")]


def test_verify_refuses_a_negative_number_of_threads(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    convert(photos, tmp_path / "x.beton")
    result = convert("verify", tmp_path / "x.beton", "--threads", "-3")
    assert_refused(result, "-3 threads: at least 1")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("stop", "expected_status"), [(ctrl_c, 130), (terminate, 75)])
def test_stopped_conversion_is_resumed_by_the_same_command(
    convert: Command,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: Callable[[], None],
    expected_status: int,
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    assert convert(photos, tmp_path / "whole" / "x.beton")[0] == 0

    calls = 0
    writev = os.writev

    def stop_at_third_call(fd: int, parts: list[bytes]) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            stop()
        return writev(fd, parts)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", stop_at_third_call)
        status, text = convert(photos, tmp_path / "stopped" / "x.beton")
    assert status == expected_status, text
    is_printed = "interrupted; the same command continues from there" in text
    assert is_printed == (stop is ctrl_c)
    assert (tmp_path / "stopped" / "x.beton.partial").exists()

    assert convert(photos, tmp_path / "stopped" / "x.beton")[0] == 0
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "whole")


# Other machines


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask scheduler with two worker processes.

    They run in a folder from which none of our modules can be imported.
    """
    folder = tmp_path_factory.mktemp("cluster")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["DASK_DISTRIBUTED__WORKER__DAEMON"] = "False"
    processes: list[subprocess.Popen[str]] = []
    logs: list[TextIO] = []

    def start(module: str, *arguments: str) -> None:
        log = open(folder / f"{module}-{len(logs)}.log", "w")  # noqa: SIM115  # closed below
        logs.append(log)
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)

    local = ["--host", "127.0.0.1"]
    information = folder / "scheduler.json"
    start("dask_scheduler", *local, "--port", "0", "--scheduler-file", str(information))
    wait_for(information.exists)
    address = json.loads(information.read_text())["address"]
    for _ in range(2):
        start("dask_worker", address, *local, "--nthreads", "1", "--no-nanny")
    yield address
    for process in reversed(processes):
        process.kill()  # a worker that is asked to end may wait for its scheduler
        process.wait()
    for log in logs:
        log.close()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("format", ["webdataset", pytest.param("tfrecord", marks=pytest.mark.slow)])
def test_dask_cluster_writes_the_same_bytes(
    scheduler: str, photos: Path, tmp_path: Path, format: str
) -> None:
    """In processes of their own: Dask's client leaves threads running."""
    command = [*CONVERT, str(photos), "x", "--format", format, "--shards", "5"]
    for folder, options in (("here", []), ("there", ["--scheduler", scheduler])):
        (tmp_path / folder).mkdir()
        run = subprocess.run(
            [*command, *options],
            cwd=tmp_path / folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"images +60", run.stdout)
    here = files_in(tmp_path / "here")
    there = files_in(tmp_path / "there")
    assert here.keys() == there.keys()
    assert here == there
    assert len([name for name in there if name.startswith("x/shard-")]) >= 5


def test_missing_scheduler_is_refused_in_one_line(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    options = ["--format", "tfrecord", "--scheduler", "tcp://127.0.0.1:9"]
    assert_refused(convert(photos, tmp_path / "x", *options), "127.0.0.1:9")


SCHEDULER_WITHOUT_WORKERS = """
import asyncio
import dask.distributed

async def main():
    async with dask.distributed.Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()

asyncio.run(main())
"""


def test_scheduler_without_workers_is_refused_in_one_line(photos: Path, tmp_path: Path) -> None:
    """The scheduler is in a process of its own, since it does not end by itself."""
    with subprocess.Popen(
        [sys.executable, "-c", SCHEDULER_WITHOUT_WORKERS], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        options = ["--format", "tfrecord", "--scheduler", address]
        command = [*CONVERT, str(photos), str(tmp_path / "x"), *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100)
        process.terminate()
    assert run.returncode == 1
    message = f"error: no worker is at {address}: start some with: dask worker {address}"
    assert run.stderr.splitlines()[-1] == message


# Kills and memory


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_kills_at_random_moments_do_not_change_the_result(tmp_path: Path, format: str) -> None:
    source = write_photos(tmp_path / "source", 2000)
    (source / "class1" / "bad.jpg").write_bytes(b"no image")
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    options = ["--format", format, "--shard-size", "700", "--threads", "1"]
    command = [*CONVERT, str(source), TARGETS[format], *options]

    subprocess.run(command, cwd=whole, check=True, capture_output=True)
    rows = 2001  # of the journals at the end
    rng = random.Random(format)
    kills = 0
    for kill_at_row in sorted(rng.randrange(rows) for _ in range(8)):
        process = subprocess.Popen(command, cwd=killed, stdout=subprocess.DEVNULL)
        while process.poll() is None and journal_rows(killed) < kill_at_row:
            time.sleep(0.001)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    subprocess.run(command, cwd=killed, check=True, capture_output=True)
    assert files_in(killed) == files_in(whole)
    print(format, "killed", kills, "times")
    assert kills > 1


def journal_rows(folder: Path) -> int:
    """How many images an unfinished conversion in this folder has dealt with."""
    rows = 0
    for path in folder.rglob("*.rows"):
        with suppress(FileNotFoundError):  # the conversion ends
            rows += len(read_journal(path))
    return rows


PEAK_MEMORY = r"""
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
# ru_maxrss would include the memory of the parent process.
print("peak", *re.findall(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()))
"""


@pytest.mark.slow
def test_memory_stays_below_a_gibibyte(tmp_path: Path) -> None:
    """400 MB of images; the memory of Python, torch and the threads is included."""
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    photo = encoded(picture(2400, 1600), quality=95)
    for i in range(400):
        (source / f"{i}.jpg").write_bytes(photo + rng.bytes(10))
    arguments = [str(ROOT / "convert.py"), str(source), str(tmp_path / "x.beton")]
    command = [sys.executable, "-c", PEAK_MEMORY, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    (peak_kib,) = re.findall(r"peak (\d+)", run.stdout)
    print("peak, MiB:", int(peak_kib) / 1024)
    assert int(peak_kib) < 1 << 20
