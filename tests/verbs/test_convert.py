"""convert.py as it is typed: folder in, training out; its words; a Dask cluster; and SIGKILLs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import FORMATS, open_store
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.runs import TINY, Command, assert_refused, read_summary

ROOT = Path(__file__).parents[2]
TARGETS = {"beton": "x.beton", "webdataset": "x", "tfrecord": "x"}


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_becomes_data_that_train(
    convert: Command, train: Command, photos: Path, tmp_path: Path, format: str
) -> None:
    target = tmp_path / TARGETS[format]
    status, text = convert(photos, target, *([] if format == "beton" else ["--format", format]))
    assert status == 0, text
    assert re.search(r"images +60 *\n +passed through +60 *\n", text)
    assert re.search(r"time +[\d.]+ s, [\d,]+ images/s, \d+ MB/s", text)
    assert f"uv run train.py --data {target}" in text
    status, text = train("--data", target, "--epochs", "1", *TINY, "--run", tmp_path / "run")
    assert status == 0, text
    assert "54 images, 6 steps" in text  # a tenth is held out
    assert read_summary(tmp_path / "run")["knn_top1_trained"] is not None


def test_all_formats_train_alike(
    convert: Command, train: Command, photos: Path, tmp_path: Path
) -> None:
    """The same order, labels and views from each: the same losses to the bit."""
    losses = []
    for format in FORMATS:
        target = tmp_path / format / TARGETS[format]
        target.parent.mkdir()
        assert convert(photos, target, "--format", format)[0] == 0
        assert (
            train("--data", target, "--epochs", "1", *TINY, "--run", tmp_path / f"run-{format}")[0]
            == 0
        )
        lines = (tmp_path / f"run-{format}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] == losses[2]


def test_train_and_val_betons_in_one_folder(
    convert: Command, train: Command, photos: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        assert convert(photos, tmp_path / "data" / f"{split}.beton")[0] == 0
    status, text = train(
        "--data", tmp_path / "data", "--epochs", "1", *TINY, "--run", tmp_path / "run"
    )
    assert status == 0, text
    assert "60 images, 7 steps" in text
    assert read_summary(tmp_path / "run")["knn_top1_trained"] is not None


def test_what_was_done_and_left_out_is_said(convert: Command, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 10, classes=1)
    (source / "class0" / "bad\n.jpg").write_bytes(b"no image")
    (source / "class0" / "a.png").write_bytes(encoded(picture(30, 20), "PNG"))
    (source / "class0" / "big.jpg").write_bytes(encoded(picture(500, 20), quality=80))
    status, text = convert(source, tmp_path / "x.beton", "--max-side", "200", "--quality", "85")
    assert status == 0, text
    for what, count in (
        ("images", 12),
        ("encoded with less quality", 10),
        ("from other formats", 1),
        ("resized", 1),
        ("left out", "1, see x.beton.rejects.jsonl"),
    ):
        assert re.search(rf"{what} +{count} *\n", text), (what, text)
    (line,) = (tmp_path / "x.beton.rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["name"].endswith("bad\n.jpg")
    status, text = convert(source, tmp_path / "x.beton", "--max-side", "200", "--quality", "85")
    assert status == 0
    assert "nothing to do" in text


def test_odd_names_are_quoted_and_spelled_out(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    target = tmp_path / "my \x1b[31m.beton"
    text = convert(photos, target)[1] + convert("verify", target)[1]
    spelled = f"{tmp_path}/my \\x1b[31m.beton"
    assert f"uv run train.py --data '{spelled}'\n" in text
    assert f"{spelled} is as it was written" in text
    assert_refused(convert("verify", target, "--threads", "-3"), "-3 threads: at least 1")
    target.write_bytes(b"")
    status, text = convert("verify", target)
    assert status == 1
    assert "\x1b" not in text


def test_verify_says_whether_all_is_well(convert: Command, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "x"
    assert convert(photos, target, "--format", "webdataset", "--shards", "2")[0] == 0
    status, text = convert("verify", target, "--against", photos)
    assert (status, text.splitlines()[-1]) == (0, f"{target} is as it was written")
    shard = target / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    row = open_store(target).index[45]
    data[row["offset"] + row["bytes"] // 2] ^= 1
    shard.write_bytes(data)
    status, text = convert("verify", target)
    assert status == 1
    assert "it is not what was written: its checksum differs" in text
    assert text.splitlines()[-1] == f"{target}: 1 problem"


def test_wrong_wishes_are_one_line(convert: Command, photos: Path, tmp_path: Path) -> None:
    assert_refused(convert(tmp_path / "nothing", tmp_path / "x.beton"), "nothing", "not there")
    assert_refused(
        convert(photos, tmp_path / "x"), "does not say which format", "beton, webdataset, tfrecord"
    )
    assert_refused(convert(photos, tmp_path / "x.beton", "--quality", "101"), "101", "at most 100")
    assert_refused(
        convert(photos, tmp_path / "x.beton", "--threads", "-3"), "threads: -3", "at least 1"
    )
    assert_refused(convert("verify", photos), "holds none of beton, webdataset, tfrecord")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    assert_refused(
        convert(tmp_path / "data", tmp_path / "x.beton"),
        "train/ and val/",
        "convert each by itself",
    )
    (tmp_path / "x.beton").write_bytes(b"precious")
    assert_refused(
        convert(photos, tmp_path / "x.beton"), "is there already", "move it, or name another"
    )
    assert (tmp_path / "x.beton").read_bytes() == b"precious"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("x.beton.")]


# ── other machines ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Dask scheduler and two worker processes, started in a folder from which nothing of ours can be imported."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}

    def start(*command: str) -> subprocess.Popen[str]:
        log = open(folder / f"{command[0]}-{len(processes)}.log", "w")  # noqa: SIM115  # for as long as it lives
        logs.append(log)
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command[0]}", *command[1:]],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    processes: list[subprocess.Popen[str]] = []
    logs: list[object] = []
    told = folder / "scheduler.json"
    processes.append(
        start(
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(told),
        )
    )
    wait_for(told.exists)
    address = json.loads(told.read_text())["address"]
    worker = (
        "dask_worker",
        address,
        "--nthreads",
        "1",
        "--no-dashboard",
        "--no-nanny",
        "--host",
        "127.0.0.1",
    )
    processes += [start(*worker), start(*worker)]
    yield address
    for process in reversed(processes):
        process.kill()  # asked to end, a worker may wait for its scheduler
        process.wait()
    for log in logs:
        log.close()  # type: ignore[attr-defined]


def wait_for(condition: object, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("format", ["webdataset", pytest.param("tfrecord", marks=pytest.mark.slow)])
def test_a_dask_cluster_writes_the_same_bytes(
    scheduler: str, photos: Path, tmp_path: Path, format: str
) -> None:
    """In processes of their own: the client leaves threads behind that are not ours to close."""
    for folder, options in (("here", []), ("there", ["--scheduler", scheduler])):
        (tmp_path / folder).mkdir()
        command = [
            sys.executable,
            str(ROOT / "convert.py"),
            str(photos),
            "x",
            "--format",
            format,
            "--shards",
            "5",
        ]
        done = subprocess.run(
            [*command, *options], cwd=tmp_path / folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"images +60", done.stdout)
    here, there = everything(tmp_path / "here"), everything(tmp_path / "there")
    assert here.keys() == there.keys()
    assert here == there
    assert len([name for name in there if name.startswith("x/shard-")]) >= 5


def test_a_cluster_that_is_not_there_is_one_line(
    convert: Command, photos: Path, tmp_path: Path
) -> None:
    assert_refused(
        convert(photos, tmp_path / "x", "--format", "tfrecord", "--scheduler", "tcp://127.0.0.1:9"),
        "127.0.0.1:9",
    )


def test_a_cluster_without_workers_is_one_line(photos: Path, tmp_path: Path) -> None:
    """The scheduler in a process of its own, which the program ends with; it would be waited for without end."""
    code = (
        "import asyncio, sys, dask.distributed as d\n"
        "async def main():\n"
        "    async with d.Scheduler(host='127.0.0.1', port=0, dashboard=False) as s:\n"
        "        print(s.address, flush=True); await s.finished()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        command = [
            sys.executable,
            str(ROOT / "convert.py"),
            str(photos),
            str(tmp_path / "x"),
            "--format",
            "tfrecord",
        ]
        done = subprocess.run(
            [*command, "--scheduler", address], capture_output=True, text=True, timeout=100
        )
        process.terminate()
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == f"error: no worker is at {address}: start some, dask worker {address}"
    )


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_sigkills_at_random_moments_do_not_show(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "source", 2000)
    (source / "class1" / "bad.jpg").write_bytes(b"no image")
    for format in FORMATS:
        (tmp_path / format / "whole").mkdir(parents=True)
        (tmp_path / format / "killed").mkdir()
        command = [
            sys.executable,
            str(ROOT / "convert.py"),
            str(source),
            TARGETS[format],
            "--format",
            format,
        ]
        command += ["--shard-size", "700", "--threads", "1"]
        began = time.monotonic()
        subprocess.run(command, cwd=tmp_path / format / "whole", check=True, capture_output=True)
        longest = time.monotonic() - began
        rng, kills = random.Random(format), 0
        for _ in range(8):
            process = subprocess.Popen(
                command, cwd=tmp_path / format / "killed", stdout=subprocess.DEVNULL
            )
            try:
                process.wait(rng.uniform(0.5, 1.05) * longest)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        subprocess.run(command, cwd=tmp_path / format / "killed", check=True, capture_output=True)
        assert everything(tmp_path / format / "killed") == everything(tmp_path / format / "whole")
        print(format, "killed", kills, "times")


@pytest.mark.slow
def test_memory_stays_below_a_gibibyte(tmp_path: Path) -> None:
    """400 MB of images; what Python, torch and the threads need is counted too."""
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    photo = encoded(picture(2400, 1600), quality=95)
    for i in range(400):
        (source / f"{i}.jpg").write_bytes(photo + rng.bytes(10))
    script = (
        "import re, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('peak', *re.findall(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()))\n"  # ru_maxrss: its parent's
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(ROOT / "convert.py"),
        str(source),
        str(tmp_path / "x.beton"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (peak,) = re.findall(r"peak (\d+)", done.stdout)
    print("peak, MB:", int(peak) / 1024)
    assert int(peak) < 1 << 20
