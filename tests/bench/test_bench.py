"""The bench: what it measures, what it says about it, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import rich.console
import torch
from PIL import Image

import pipeline
from bench import doctor, options, peer_comparison, record, report, rooflines, run, tables
from bench.peers import peers
from bench.record import Contender, Data, Machine, Rates, Record, Rung
from bench.stages import Ladder, Setting
from bench.timing import Clock, RankGroup, one_core
from bench.verdict import (
    COLD,
    COPY,
    CORES,
    DECODE,
    DISK,
    DISTORT,
    E2E,
    FEED,
    ONE_CORE,
    PLAN,
    STEP,
    TWO_CROPS,
    WARM,
)
from experiment.console import Console
from experiment.presets import PRESETS
from pipeline.decoders import cpu
from tests.helpers.images import encoded, picture, write_photos
from tests.helpers.libraries import needed
from tests.helpers.runs import refused
from tests.helpers.stores import as_records

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ALONE = RankGroup(0, 1, 1, None)
LADDER = [PLAN, COLD, WARM, DECODE, TWO_CROPS, DISTORT, FEED, STEP, E2E]

# ── the clock ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sleepy(
    seconds: float, images: int = 5, warm_up: float = 0.0
) -> Callable[[], Generator[int, None, None]]:
    def work() -> Generator[int, None, None]:
        for turn in range(1000):
            time.sleep(warm_up if turn < 2 else seconds)
            yield images

    return work


def test_a_rate_is_images_by_time_without_what_comes_before_and_the_warm_up() -> None:
    calls: list[int] = []

    def before() -> None:
        calls.append(1)
        time.sleep(0.3)

    (rates,) = Clock(CPU, ALONE, 0.1, 3).together(sleepy(0.01, warm_up=0.2), before)
    assert len(rates.images_per_s) == len(calls) == 3
    assert 150 < rates.median <= 500  # timed as well, they would leave 60


def test_each_repeat_is_new_work_that_is_closed_again() -> None:
    events: list[str] = []

    def work() -> Generator[int, None, None]:
        events.append("open")
        try:
            while True:
                time.sleep(0.001)
                yield 1
        finally:
            events.append("closed")

    Clock(CPU, ALONE, 0.01, 3, lambda: events.append("done")).together(work)
    assert events == ["open", "closed", "done"] * 3


def test_work_that_ends_early_is_counted_in_full() -> None:
    def work() -> Generator[int, None, None]:
        yield from (0, 0)
        time.sleep(0.05)
        yield 10

    (rates,) = Clock(CPU, ALONE, 60.0, 2).together(work)
    assert 20 < rates.median <= 200


def test_medians_and_spreads() -> None:
    assert Rates([90.0, 100.0, 130.0]).median == 100
    assert Rates([90.0, 100.0, 130.0]).spread == pytest.approx(0.2)
    of_two = Rung(
        FEED, "", Rates([80.0]), "cores", ranks=[Rates([80.0]), Rates([70.0])], alone=Rates([100.0])
    )
    assert of_two.total == 150
    assert of_two.contention == pytest.approx(0.25)
    assert Rung(FEED, "", Rates([80.0]), "cores").contention == 0


def test_one_core_is_given_back() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with one_core():
        assert os.sched_getaffinity(0) == {max(cores)}
        assert torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_share_their_figures_and_wait_for_each_other() -> None:
    code = """
import os, json, time
from bench.timing import RankGroup
ranks = RankGroup.started(dict(os.environ))
time.sleep(1.0 * ranks.rank)
first = ranks.from_rank0([ranks.rank, 0.5])
met = time.time()
ranks.meet()
print(json.dumps([first, ranks.from_rank0([10.0 * ranks.rank]), met]))
ranks.meet()
"""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [s[:2] for s in said] == [[[[0, 0.5], [1, 0.5]], [[0.0], [10.0]]]] * 2
    assert abs(said[0][2] - said[1][2]) < 0.9


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────


def a_record(gpu: bool = False, ranks: int = 1) -> Record:
    """As a run leaves it, with figures made up."""
    names = [
        PLAN,
        COLD,
        WARM,
        DECODE,
        TWO_CROPS,
        DISTORT,
        COPY if gpu else ONE_CORE,
        FEED,
        STEP,
        E2E,
    ]
    on = {PLAN: "one core", COLD: "disk", COPY: "bus", ONE_CORE: "one core"}
    rungs = []
    for i, name in enumerate(names):
        rates = Rates([100.0 * (i + 1), 110.0 * (i + 1), 120.0 * (i + 1)])
        every = [rates] * ranks if ranks > 1 else []
        alone = Rates([150.0 * (i + 1)]) if ranks > 1 else None
        rungs.append(
            Rung(
                name,
                "what it is",
                rates,
                on.get(name, "cores"),
                2000.0,
                "its parts in turn",
                every,
                alone,
            )
        )
    contenders = [
        Contender(
            name, "" if i == 0 else "x" * 90, {"torch": "2"}, Rates([10.0 + i, 11.0 + i]), 1.0 + i
        )
        for i, name in enumerate(
            ["authors' transform (Pillow)", "kornia", "twinfeed, torchvision, 400 px"]
        )
    ]
    return Record(
        command="python -m bench --quick",
        commit="0123456789ab",
        versions={"python": "3.12", "torch": "2.15.0"},
        machine=Machine(
            "EPYC",
            2,
            24.0,
            *(("H100", 700.0, "580.1") if gpu else (None, None, None)),
            "Linux x86_64",
        ),
        data=Data("drawn photographs", 128, 95_000.0, 500.0, 375.0),
        settings={
            **{
                "size": 224,
                "batch_size": 32,
                "decoder": "torchvision",
                "threads": 2,
                "ranks": ranks,
            },
            **{"network": "resnet18 of width 16", "quick": True, "cold_read_from_disk": 0.1},
        },
        rungs=rungs,
        contenders=contenders,
        bounds={CORES: 67.0},
        verdict=["Step-bound.", "End to end, training reaches 41 images/s."],
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, ranks: int) -> None:
    written = a_record(ranks=ranks)
    written.write(tmp_path / "a.json")
    found = record.read(tmp_path / "a.json")
    assert found == written
    assert isinstance(found.rungs[0].rates, Rates)
    assert isinstance(found.contenders[0].rates, Rates)
    assert found.rungs[0].alone == (Rates([150.0]) if ranks == 2 else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, ("schema 99", "reads 1", "measure again")),
        ({"rungs": [{"name": "plan"}]}, ("no record",)),
        ({"rungs": ["plan"]}, ("no record",)),
        ({"rungs": None}, ("no record",)),
        ({"machine": {"cpu": "x"}}, ("no record",)),
        ({"more": 1}, ("no record",)),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], words: tuple[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(dataclasses.asdict(a_record()) | change))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        record.read(path)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "contents", [b"", b'{"schema": 1', b"[]", b'"schema"', b"1", b"\xff\xd8\xff", b'{"a": 1}']
)
def test_a_damaged_file_is_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.json").write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.json is no record of the bench"):
        record.read(tmp_path / "a.json")


def test_the_command_names_no_folders() -> None:
    typed = [
        "--data",
        "/home/me/secret/photos",
        "--json=/srv/private/a.json",
        "--quick",
        "--images",
        "7",
    ]
    assert record.command(typed) == "python -m bench --data photos --json=a.json --quick --images 7"
    assert record.command(["--data", "."]).split()[-1] == Path.cwd().name
    assert record.command(["--quick"], 4) == "torchrun --nproc-per-node 4 -m bench --quick"


def test_the_commit_is_that_of_this_checkout_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if head:
        assert record.commit().rstrip("+") == head[:12]
    monkeypatch.setattr(record, "_ROOT", tmp_path)
    assert record.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of somebody else"], check=True)
    assert len(record.commit()) == 12
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(record, "_ROOT", tmp_path / "inside")
    assert record.commit() == "unknown"


def test_a_control_group_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_MEMORY_MAX", tmp_path / "memory.max")
    physical = record.memory_gib()
    (tmp_path / "memory.max").write_text("max\n")
    assert record.memory_gib() == physical
    (tmp_path / "memory.max").write_text(f"{1 << 29}\n")
    assert record.memory_gib() == 0.5


# ── the ladder ───────────────────────────────────────────────────────────────────────────────────────────────────────

Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """`python -m bench` in this process, with repeats of a moment: (exit status, everything it said)."""
    monkeypatch.delenv("TWINFEED_TRACEBACK", raising=False)
    monkeypatch.setattr(run, "_QUICK", (0.01, 2))
    monkeypatch.setattr(rooflines, "_SECONDS", 0.0)
    threads = torch.get_num_threads()

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("bench", run_name="__main__")
        said = capsys.readouterr()
        status: Any = end.value.code or 0
        text = said.out + said.err + (f"{status}\n" if isinstance(status, str) else "")
        assert "Traceback" not in text
        return 1 if isinstance(status, str) else status, text

    yield start
    torch.set_num_threads(threads)


TINY = ["--device", "cpu", "--size", "24", "--quick"]


def measured(bench: Bench, folder: Path, *more: object) -> tuple[Record, str]:
    path = folder.parent / "record.json"
    status, text = bench(*TINY, "--data", folder, "--json", path, *more)
    assert status == 0, text
    return record.read(path), text


def check(found: Record, text: str) -> None:
    """What every run promises."""
    names = [rung.name for rung in found.rungs]
    assert [name for name in names if name != ONE_CORE] == LADDER
    assert (ONE_CORE in names) == (found.settings["threads"] > 1 and found.settings["ranks"] == 1)
    assert all(rate > 0 for rung in found.rungs for rate in rung.rates.images_per_s)
    assert all(len(rung.rates.images_per_s) == 2 for rung in found.rungs)
    assert all(
        rung.ceiling and rung.ceiling_is
        for rung in found.rungs
        if rung.name not in (PLAN, DECODE, ONE_CORE)
    )
    assert found.bounds == {CORES: pytest.approx(found.bounds[CORES])}
    assert "-bound on" in found.verdict[0]
    assert all(name in text for name in names)
    assert all(sentence in text for sentence in found.verdict)
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert found.machine.cores == pipeline.usable_cores()
    assert found.machine.gpu is None
    assert len(found.commit) in (12, 13) or found.commit == "unknown"


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "forty", 40)


def test_every_rung_is_measured_recorded_and_shown(bench: Bench, forty: Path) -> None:
    found, text = measured(bench, forty, "--no-peers")
    check(found, text)
    assert found.contenders == []
    sizes = [path.stat().st_size for path in forty.rglob("*.jpg")]
    assert found.data == dataclasses.replace(found.data, name="images of forty", images=40)
    assert found.data.mean_bytes == pytest.approx(np.mean(sizes))
    assert found.settings["batch_size"] == 32
    assert str(forty.parent) not in (forty.parent / "record.json").read_text()
    decode = next(rung for rung in found.rungs if rung.name == DECODE)
    assert decode.ceiling_is == "bare libjpeg-turbo"


def test_fewer_images_than_a_batch_and_the_peers_beside_them(bench: Bench, tmp_path: Path) -> None:
    found, text = measured(bench, write_photos(tmp_path / "few", 9))
    check(found, text)
    assert found.settings["batch_size"] == found.data.images == 9
    assert {c.name for c in found.contenders} > {
        "authors' transform (Pillow)",
        "twinfeed, torchvision",
    }
    assert all(c.name in text for c in found.contenders)


def test_a_folder_with_other_formats_and_broken_files(bench: Bench, forty: Path) -> None:
    for number, format in enumerate(("PNG", "WebP")):
        (forty / "class0" / f"{number}.{format.lower()}").write_bytes(
            encoded(picture(60, 50), format)
        )
    (forty / "class0" / "0000.jpg").write_bytes(b"no image")
    whole = (forty / "class1" / "0001.jpg").read_bytes()
    (forty / "class1" / "0001.jpg").write_bytes(whole[: len(whole) // 2])
    (forty / "class2" / "cmyk.jpg").write_bytes(encoded(picture(60, 50, mode="CMYK")))
    found, text = measured(bench, forty)
    check(found, text)
    assert found.data.images == 42
    assert "left out class0/0000.jpg" in text
    assert "replaced, since it does not decode" in text
    assert "0001.jpg: truncated or damaged" in text
    decode = next(rung for rung in found.rungs if rung.name == DECODE)
    assert (decode.ceiling, decode.ceiling_is) == (
        None,
        "",
    )  # no bare JPEG decoding stands beside PNG
    assert found.contenders[0].ratio == 1


def test_the_ladder_with_dali(bench: Bench, forty: Path) -> None:
    if not pipeline_has("nvidia-dali-cuda130"):
        pytest.skip("DALI is not installed")
    found, text = measured(bench, forty, "--decoder", "dali", "--no-peers", "--threads", 1)
    check(found, text)
    assert found.settings["decoder"] == "dali"


def pipeline_has(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all", "is not there"]),
        (["--images", "1"], ["--images is 1", "at least 2"]),
        (["--batch-size", "1"], ["--batch-size is 1", "at least 2"]),
        (["--size", "0"], ["--size is 0"]),
        (["--threads", "0"], ["--threads is 0"]),
        (["--device", "tpu"], ["'tpu'", "cuda:N"]),
        (["--json", "/nowhere/at/all.json"], ["/nowhere/at/all.json", "cannot be written"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    bench: Bench, arguments: list[str], words: list[str]
) -> None:
    refused(bench("--quick", *arguments), *words)


def test_too_few_images_are_refused(bench: Bench, tmp_path: Path) -> None:
    refused(bench(*TINY, "--data", write_photos(tmp_path / "one", 1)), "1 images are too few")


def test_images_of_which_none_decodes_are_refused(bench: Bench, tmp_path: Path) -> None:
    for path in write_photos(tmp_path / "torn", 3).rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-400])
    refused(bench(*TINY, "--data", tmp_path / "torn"), "none of the first", "decodes", "0000.jpg")


def test_the_options_are_those_of_the_pipeline_and_the_presets() -> None:
    hints = get_type_hints(options.Bench)
    assert get_args(hints["decoder"]) == ("auto", *pipeline.DECODERS)
    assert set(get_args(get_args(hints["preset"])[0])) == set(PRESETS)


def test_help_is_answered_before_torch_is_loaded() -> None:
    code = "import sys; from bench.__main__ import main\ntry: main({})\nfinally: print('torch' in sys.modules)"
    for arguments in (["--help"], ["report", "--help"], ["doctor", "--help"]):
        said = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], cwd=ROOT, capture_output=True, text=True
        )
        assert said.stdout.splitlines()[-1] == "False"
        assert "type: ignore" not in said.stdout


def ladder_of(folder: Path, threads: int = 2, rank: int = 0, world: int = 1) -> Ladder:
    preset = PRESETS["demo"]()
    store = pipeline.open_store(folder)
    return Ladder(
        Setting(store, 24, 8, "torchvision", threads, CPU, preset.model, preset.optim), rank, world
    )


def test_a_cold_read_takes_every_image_once_shared_among_the_ranks(forty: Path) -> None:
    for threads in (1, 2, 32):
        assert sum(ladder_of(forty).cold_read(threads)()) == 40
    parts = [ladder_of(forty, rank=rank, world=3) for rank in range(3)]
    assert sorted(np.concatenate([part.mine for part in parts])) == list(range(40))
    assert [sum(part.cold_read(2)()) for part in parts] == [14, 13, 13]


def on_a_disk(path: Path) -> bool:
    """Whether this file can be dropped from memory, and is then read from a disk, as far as the system says."""

    def read() -> int:
        said = (
            Path("/proc/self/io").read_text()
            if os.access("/proc/self/io", os.R_OK)
            else "read_bytes: 0"
        )
        return int(re.findall(r"^read_bytes: (\d+)", said, re.MULTILINE)[0])

    os.sync()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read()
        file.read()
    return read() > before


def test_a_cold_read_comes_from_the_disk(forty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_a_disk(forty / "class0" / "0000.jpg"):
        pytest.skip("the temporary folder is not on a disk whose reads are counted")
    ladder = ladder_of(forty)
    assert (ladder.from_disk() or 0) > 0.9
    monkeypatch.setattr(ladder, "forget_files", lambda: None)
    assert ladder.from_disk() == 0


def test_a_cold_read_of_records_comes_from_the_disk(forty: Path, tmp_path: Path) -> None:
    """Of part of them as well: the whole file is dropped."""
    records = as_records(pipeline.open_store(forty), tmp_path)
    if not on_a_disk(records.files[0]):
        pytest.skip("the temporary folder is not on a disk whose reads are counted")
    preset = PRESETS["demo"]()
    for store in (records, pipeline.random_subset(30, records)):
        setting = Setting(store, 24, 8, "torchvision", 1, CPU, preset.model, preset.optim)
        assert (Ladder(setting).from_disk() or 0) > 0.9


def test_data_larger_than_the_memory_are_read_from_the_disk_in_every_epoch(
    bench: Bench, forty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "memory_gib", lambda: 1e-6)
    found, _ = measured(bench, forty, "--no-peers")
    assert found.bounds.keys() == {CORES, DISK}


def test_decode_does_whole_images_and_crops_what_the_recipe_says(
    forty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from inside: the pixels that leave `decode`, and the size of what is cut out of them."""

    cut: list[tuple[tuple[int, ...], int]] = []
    crop = cpu.crop

    def watched(
        pixels: torch.Tensor, box: Any, size: int, *rest: Any, **named: Any
    ) -> torch.Tensor:
        cut.append((tuple(pixels.shape[1:]), size))
        return crop(pixels, box, size, *rest, **named)

    monkeypatch.setattr(cpu, "crop", watched)
    ladder = ladder_of(forty)
    whole = {(int(row["height"]), int(row["width"])) for row in ladder.setting.store.index}
    for work, views, size in ((ladder.decode, 1, 1), (ladder.crops, 2, 24)):
        cut.clear()
        turns = work()
        assert [next(turns) for _ in range(3)] == [8, 8, 8]
        turns.close()
        assert {side for _, side in cut} == {size}
        assert {shape for shape, _ in cut} <= whole
        assert len(cut) >= 3 * 8 * views


def test_every_rung_counts_the_images_of_a_batch(forty: Path) -> None:
    ladder = ladder_of(forty)
    for work in (
        ladder.step(),
        ladder.end_to_end(),
        ladder.feed(),
        ladder.distort(),
        ladder.plan(),
        ladder.warm_read(),
    ):
        assert next(work) in (8, 16)  # reading goes by sixteen
        work.close()
    assert ladder.train is ladder.train


def test_ceilings_come_from_what_they_are_called_after() -> None:
    jpegs = [encoded(picture(200, 150, seed=i)) for i in range(4)]
    assert rooflines.reading(1000, 1) == pytest.approx(2 * rooflines.reading(2000, 1), rel=0.6)
    assert (rooflines.decoding(jpegs, 1) or 0) > 0
    assert rooflines.decoding([*jpegs, encoded(picture(60, 50), "PNG")], 1) is None
    assert rooflines.decoding([*jpegs, jpegs[0][:-300]], 1) is None
    small = [Image.open(io.BytesIO(data)) for data in rooflines.smaller(jpegs, 100)]
    assert {image.size for image in small} == {(100, 75)}


def test_the_multiplications_of_a_step_are_those_of_its_layers() -> None:
    """A linear projector alone, by hand: forward 2, gradients of inputs 2 and of weights 2 for each weight and view."""
    network = PRESETS["demo"]().model
    narrow = rooflines.step_flop(dataclasses.replace(network, projector="512-512"), 32)
    wide = rooflines.step_flop(dataclasses.replace(network, projector="512-512-512"), 32)
    assert wide - narrow == 6 * 512 * 512 * 2


# ── under torchrun ───────────────────────────────────────────────────────────────────────────────────────────────────


def ranks_of_two(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return subprocess.run(
        [*launcher, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def check_two_ranks(done: subprocess.CompletedProcess[str], path: Path) -> Record:
    assert done.returncode == 0, done.stderr
    found = record.read(path)
    assert [rung.name for rung in found.rungs] == LADDER
    for rung in found.rungs:
        assert len(rung.ranks) == 2
        assert rung.rates == rung.ranks[0]
        assert rung.total == sum(statistics.median(rank.images_per_s) for rank in rung.ranks)
        assert rung.alone is not None
        assert rung.contention == pytest.approx(1 - rung.total / 2 / rung.alone.median)
        assert rung.contention < 1
    assert any(rung.ranks[0] != rung.ranks[1] for rung in found.rungs)
    assert found.settings["ranks"] == 2
    assert found.command.startswith("torchrun --nproc-per-node 2 -m bench")
    assert done.stdout.count("2 ranks in sum") == 1
    assert done.stdout.count("reaches") >= 1
    assert done.stdout.count("written to") == 1
    assert (
        sum(line.startswith("cold read") for line in done.stdout.splitlines()) == 2
    )  # ladder, and ranks
    return found


@pytest.mark.slow
def test_two_ranks_share_the_figures_and_one_of_them_speaks(forty: Path, tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom bench import __main__, run\n"
        "run._QUICK = 0.01, 2\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    path = tmp_path / "ranks.json"
    done = ranks_of_two(str(script), *TINY, "--data", str(forty), "--json", str(path))
    found = check_two_ranks(done, path)
    assert found.verdict[0].startswith("Of each of 2 ranks, all at work: ")


@pytest.mark.slow
def test_two_ranks_with_repeats_of_full_length(forty: Path, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    done = ranks_of_two("-m", "bench", *TINY, "--data", str(forty), "--json", str(path))
    found = check_two_ranks(done, path)
    assert all(len(rung.ranks[1].images_per_s) == 3 for rung in found.rungs)


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_quick_run_on_drawn_photographs_stays_within_a_minute(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "a.json"),
    ]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if os.getloadavg()[0] < 1.5 * pipeline.usable_cores():  # else others slow it down
        assert time.monotonic() - began < 60 + 15  # and the drawing, once
    found = record.read(tmp_path / "a.json")
    for rung in (
        found.rungs
    ):  # a ceiling is one; the noise of a shared machine hits sums of several rungs harder
        most = 1.5 if rung.ceiling_is == "its parts in turn" else 1.2
        assert rung.ceiling is None or rung.rates.median < most * rung.ceiling, rung.name


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_with_130_and_leaves_nothing_behind(forty: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench",
        "--device",
        "cpu",
        "--data",
        str(forty),
        "--size",
        "24",
    ]
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    for wait in (1.0, 14.0, 20.0):  # while torch is loaded, and on the ladder
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
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
        with pytest.raises(ProcessLookupError):  # nobody is left in its group
            os.killpg(process.pid, 0)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ranks", [1, 2])
def test_80_columns_break_no_line_of_the_tables(ranks: int) -> None:
    console, file = Console(), io.StringIO()
    console.rich = rich.console.Console(file=file, width=80, highlight=False)  # type: ignore[assignment]
    result = a_record(ranks=ranks)
    tables.record(result, console)
    lines = file.getvalue().splitlines()
    names = [rung.name for rung in result.rungs] * ranks + [c.name for c in result.contenders]
    assert all(
        sum(line.startswith(name + "  ") for line in lines) == names.count(name) for name in names
    )
    assert f"kornia: {'x' * 90}" in "".join(lines).replace("kornia:x", "kornia: x")
    assert "Only 10% of the cold read came from the disk" in file.getvalue()
    assert max(map(len, lines)) <= 80
    assert sum("its parts in turn" in line for line in lines) == len(result.rungs)


def test_a_narrow_terminal_cuts_lines_of_the_tables_and_breaks_none() -> None:
    console, file = Console(), io.StringIO()
    console.rich = rich.console.Console(file=file, width=45, highlight=False)  # type: ignore[assignment]
    result = dataclasses.replace(a_record(), contenders=[], verdict=[])
    tables.record(result, console)
    table = file.getvalue().split("\n\n")[1].splitlines()
    assert (
        len(table) == 1 + len(result.rungs) + 2
    )  # and the sentence about the cold read, in two lines


def test_figures_have_three_digits() -> None:
    assert [tables.number(rate) for rate in (103_237.4, 808.2, 74.31, 1.0)] == [
        "103,237",
        "808",
        "74.3",
        "1",
    ]
    result = a_record()
    assert tables.row(result.rungs[3], result) == (
        DECODE,
        "440",
        "9%",
        "220",
        "22% of its parts in turn",
    )
    assert tables.row(result.rungs[0], result)[3] == "110"  # on one core
    assert tables.row(result.rungs[1], result)[3] == ""  # the disk has none


@pytest.mark.parametrize("gpu", [False, True])
def test_the_report_holds_every_rung_and_contender(gpu: bool) -> None:
    result = a_record(gpu)
    text = report.markdown(result)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(result.rungs) + 2 + len(result.contenders)
    assert len({line.count("|") for line in rows}) == 1
    for rung, line in zip(result.rungs, rows[2:], strict=False):
        assert line.startswith(f"| {rung.name} | {tables.number(rung.rates.median)} |")
    for c, line in zip(result.contenders, rows[4 + len(result.rungs) :], strict=True):
        assert line.startswith(f"| {c.name} | {tables.number(c.rates.median)} |")
        assert f"| {c.ratio:.2f} |" in line
    assert all(
        word in text
        for word in (result.commit, result.command, "EPYC", "torch 2.15.0", *result.verdict)
    )
    assert ("H100 at 700 W" in text) == gpu


def test_the_report_is_printed_and_drawn(bench: Bench, tmp_path: Path) -> None:
    needed("matplotlib")
    for name, result in (
        ("a", a_record()),
        ("b", dataclasses.replace(a_record(True), contenders=[])),
    ):
        result.write(tmp_path / f"{name}.json")
    status, text = bench(
        "report", tmp_path / "a.json", tmp_path / "b.json", "--plot", tmp_path / "a.png"
    )
    assert status == 0
    assert text.strip() == "\n\n".join(
        report.markdown(record.read(tmp_path / f"{name}.json")) for name in "ab"
    )
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 20
    refused(bench("report", tmp_path / "c.json"), "c.json")


def test_the_page_shows_what_was_measured() -> None:
    records = sorted((ROOT / "bench" / "results").glob("feed-*.json"))
    if not records:
        pytest.skip("bench/results holds no feed-*.json yet")
    page = (ROOT / "docs" / "throughput.md").read_text()
    shown = page.partition("<!-- bench -->")[2].partition("<!-- /bench -->")[0].splitlines()
    for path in records:
        for line in report.markdown(record.read(path)).splitlines():
            assert not line.startswith("|") or line in shown, path.name


# ── the doctor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def finding(text: str, what: str) -> str:
    """The line about something, and its remedy."""
    (line,) = re.findall(rf"^{what} .*(?:\n +->.*)?", text, re.MULTILINE)
    return line


def test_the_doctor_names_everything_and_is_content(bench: Bench) -> None:
    status, text = bench("doctor")
    assert status == 0
    for part in doctor._PARTS:
        assert part.brings in finding(text, part.distribution)
    for what in (
        "python",
        "GPU",
        "cores",
        "memory",
        "cache folder",
        "this folder",
        "huge pages",
        "open files",
    ):
        finding(text, what)
    assert "ok" in finding(text, "torch")
    assert metadata.version("torch") in finding(text, "torch")
    assert "WRONG" not in text


def test_a_peer_that_cannot_be_imported_is_missing_and_one_that_is_needed_is_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, text = bench("doctor")
    assert status == 0
    assert re.search(
        r"missing  .*cannot be imported: import of matplotlib.*\n.*-> uv sync --group bench",
        finding(text, "matplotlib"),
    )
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    status, text = bench("doctor")
    assert status == 1
    assert re.search(r"WRONG .*cannot be imported: .*\n.*-> uv sync", finding(text, "simplejpeg"))


def test_the_doctor_works_where_torch_is_not_installed() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, Absent())
from bench.__main__ import main
sys.exit(main(["doctor"]))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 1, said.stderr
    assert "WRONG" in finding(said.stdout, "torch")
    assert "cores" in said.stdout


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    part = doctor.Part("nothing", "no-such-library", "brings much", "uv sync --group much")
    assert doctor.library(part) == (
        "no-such-library",
        "missing",
        "not installed: brings much",
        "uv sync --group much",
    )
    assert doctor.library(part._replace(needed=True)).state == "WRONG"


def test_a_quota_below_the_cores_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))

    def cores(limit: str) -> doctor.Finding:
        (tmp_path / "cpu.max").write_text(limit)
        return next(doctor.machine())

    assert cores("350000 100000\n")[2:] == (
        f"16 of {os.cpu_count()} may be used, but a container's quota of 3.5",
        "--threads 3",
    )
    for unlimited in ("max 100000\n", "9900000 100000\n", "rubbish"):
        assert cores(unlimited).remedy == ""


def test_a_driver_that_is_too_old_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str = "auto") -> torch.device:
        raise ValueError("the driver is too old")

    monkeypatch.setattr(pipeline, "find_device", fails)
    status, text = bench("doctor")
    assert status == 1
    assert re.search(r"WRONG +the driver is too old\n.*release 580", finding(text, "GPU"))


def test_nvidia_smi_is_asked_for_the_gpu_by_its_uuid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        uuid = "12-34"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    device = torch.device("cuda:1")
    assert record.gpu_settings(device) == (None, None)  # there is no nvidia-smi
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-12-34*) echo "$SAID";; esac\n')
    command.chmod(0o755)
    for said, meant in (
        ("700.00, 580.65.06", (700.0, "580.65.06")),
        ("[N/A], 580.65.06", (None, "580.65.06")),
    ):
        monkeypatch.setenv("SAID", said)
        assert record.gpu_settings(device) == meant


# ── the contest ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_take_part_and_are_compared_with_the_authors_turn_by_turn() -> None:
    pictures = [encoded(picture(90, 70, seed=i)) for i in range(4)]
    with Console() as console, console.progress("contest") as bar:
        found = peer_comparison.contest([encoded(picture(9, 9), "PNG"), *pictures], 24, True, bar)
    names = [c.name for c in found]
    ours = {f"twinfeed, {d}{small}" for d in pipeline.FOR_ANY_STORE for small in ("", ", 400 px")}
    if not pipeline_has("nvidia-dali-cuda130"):
        ours = {name for name in ours if "dali" not in name}
    assert names[: len(names) - len(ours)] == [peer.name for peer in peers(24)]
    assert set(names[len(names) - len(ours) :]) == ours
    assert found[0].name.startswith("authors'")
    assert found[0].ratio == 1
    for c in found:
        assert len(c.rates.images_per_s) == 3
        turns = zip(c.rates.images_per_s, found[0].rates.images_per_s, strict=True)
        assert c.ratio == pytest.approx(statistics.median(a / b for a, b in turns))
        assert c.versions["python"]


def test_there_is_no_contest_without_jpegs() -> None:
    with Console() as console, console.progress("contest") as bar:
        assert peer_comparison.contest([encoded(picture(9, 9), "PNG")], 24, True, bar) == []


def test_our_loaders_do_every_image_that_the_others_do() -> None:
    """With a batch that is not full as well."""
    pictures = [encoded(picture(50, 40, seed=i)) for i in range(21)]
    loaders = [
        e.run.args[0]
        for e in peer_comparison._entrants(pictures, 24)
        if e.name.startswith("twinfeed")
    ]  # type: ignore[attr-defined]
    assert len(loaders) >= 2
    for loader in loaders:
        assert sorted(int(s) for batch in loader.epoch(0) for s in batch.samples) == list(range(21))
