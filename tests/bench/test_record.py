"""Records: written and read again, old schemas, damaged files, and what they say about the run."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import record
from bench.record import ConversionRate, PeerResult, Rates, StageResult, StepResult
from bench.stage_names import FEED
from experiment import provenance
from tests.helpers.benchmarks import make_record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def test_median_and_spread_of_repeats() -> None:
    rates = Rates([90.0, 100.0, 130.0])
    assert rates.median == 100
    assert rates.spread == pytest.approx(0.2)


def test_rates_are_images_by_seconds() -> None:
    assert Rates.from_seconds(8, [2.0, 0.5]).images_per_s == [4, 16]


def test_contention_compares_ranks_together_with_one_alone() -> None:
    of_two = StageResult(
        name=FEED,
        description="",
        rates=Rates([80.0]),
        resource="cores",
        ranks=[Rates([80.0]), Rates([70.0])],
        alone=Rates([100.0]),
    )
    assert of_two.total == 150
    assert of_two.contention == pytest.approx(0.25)
    assert StageResult(FEED, "", Rates([80.0]), "cores").contention == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, ranks: int) -> None:
    written = make_record(ranks=ranks)
    written.write(tmp_path / "a.json")
    read = record.read(tmp_path / "a.json")
    assert read == written
    assert isinstance(read.stages[0].rates, Rates)
    assert isinstance(read.peers[0].rates, Rates)
    assert read.stages[0].alone == (Rates([150.0]) if ranks == 2 else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, ("schema 99", "reads 1 and 2", "measure again")),
        ({"stages": [{"name": "plan"}]}, ("not a record",)),
        ({"stages": ["plan"]}, ("not a record",)),
        ({"stages": None}, ("not a record",)),
        ({"machine": {"cpu": "x"}}, ("not a record",)),
        ({"more": 1}, ("not a record",)),
    ],
)
def test_a_file_with_other_contents_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**dataclasses.asdict(make_record()), **change}))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        record.read(path)
    message = str(error.value)
    assert all(word in message for word in words)
    assert "\n" not in message


@pytest.mark.parametrize(
    "contents", [b"", b'{"schema": 2', b"[]", b'"schema"', b"1", b"\xff\xd8\xff", b'{"a": 1}']
)
def test_a_damaged_file_is_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.json").write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.json is not a record of the benchmark"):
        record.read(tmp_path / "a.json")


# Records of schema 1, as earlier versions wrote them.

MACHINE = {
    "cpu": "EPYC",
    "cores": 2,
    "memory_gib": 24.0,
    "gpu": None,
    "gpu_power_limit_w": None,
    "gpu_driver": None,
    "system": "Linux x86_64",
}
DATA = {
    "name": "drawn photographs",
    "images": 128,
    "mean_bytes": 95_000.0,
    "mean_width": 500.0,
    "mean_height": 375.0,
}
STAGE = {
    "name": "decode",
    "what": "whole images, from memory",
    "rates": {"images_per_s": [800.0, 810.0]},
    "on": "cores",
    "ceiling": 900.0,
    "ceiling_is": "bare libjpeg-turbo",
    "ranks": [{"images_per_s": [800.0, 810.0]}, {"images_per_s": [790.0, 780.0]}],
    "alone": {"images_per_s": [850.0, 860.0]},
}
PEER = {
    "name": "kornia",
    "differs": "blur within 6 pixels",
    "versions": {"kornia": "0.9.0"},
    "rates": {"images_per_s": [60.0]},
    "ratio": 0.8,
}
STEP = {
    "name": "+ compiled",
    "against": "the authors' step",
    "precision": "float32",
    "batch_size": 128,
    "rates": {"images_per_s": [700.0]},
    "ratio": 1.4,
    "memory_gib": None,
}


def schema_1(**changes: Any) -> dict[str, Any]:
    return {
        "command": "python -m bench",
        "commit": "0123456789ab",
        "versions": {"python": "3.12"},
        "machine": MACHINE,
        "data": DATA,
        "settings": {"size": 224},
        "rungs": [],
        "contenders": [],
        "bounds": {"the cores": 56.2},
        "verdict": ["Step-bound."],
        "schema": 1,
        **changes,
    }


def read_json(path: Path, values: dict[str, Any]) -> record.Record:
    path.write_text(json.dumps(values))
    return record.read(path)


def test_stages_and_peers_of_schema_1(tmp_path: Path) -> None:
    result = read_json(tmp_path / "a.json", schema_1(rungs=[STAGE], contenders=[PEER]))
    expected = StageResult(
        name="decode",
        description="whole images, from memory",
        rates=Rates([800.0, 810.0]),
        resource="cores",
        roofline=900.0,
        roofline_name="bare libjpeg-turbo",
        ranks=[Rates([800.0, 810.0]), Rates([790.0, 780.0])],
        alone=Rates([850.0, 860.0]),
    )
    assert result.stages == [expected]
    assert result.peers == [
        PeerResult("kornia", "blur within 6 pixels", {"kornia": "0.9.0"}, Rates([60.0]), 0.8)
    ]
    assert (result.conversions, result.steps) == ([], [])
    assert result.bounds == {"the cores": 56.2}
    assert result.verdict == ["Step-bound."]
    assert result.schema == 2


def test_conversions_of_schema_1(tmp_path: Path) -> None:
    writers = [
        {**PEER, "name": "FFCV's writer", "differs": "", "versions": {}},
        {**PEER, "name": "twinfeed, beton", "differs": "FFCV's writer", "versions": {}},
    ]
    settings = {"turns": 7, "side": 400, "quality": 90}
    values = schema_1(contenders=writers, settings=settings)
    result = read_json(tmp_path / "a.json", values)
    assert result.conversions == [
        ConversionRate("FFCV's writer", "FFCV's writer", Rates([60.0]), 0.8),
        ConversionRate("twinfeed, beton", "FFCV's writer", Rates([60.0]), 0.8),
    ]
    assert result.peers == []
    assert result.settings == {"rounds": 7, "side": 400, "quality": 90}


def test_steps_of_schema_1(tmp_path: Path) -> None:
    result = read_json(tmp_path / "a.json", schema_1(steps=[STEP], settings={"turns": 5}))
    rates = Rates([700.0])
    assert result.steps == [
        StepResult("+ compiled", "the authors' step", "float32", 128, rates, 1.4, None)
    ]
    assert result.settings == {"rounds": 5}


def test_a_record_of_schema_1_is_written_with_schema_2(tmp_path: Path) -> None:
    result = read_json(tmp_path / "a.json", schema_1(rungs=[STAGE], contenders=[PEER]))
    result.write(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["schema"] == 2
    assert record.read(tmp_path / "b.json") == result


def test_committed_records_have_the_current_schema() -> None:
    paths = sorted(RESULTS.glob("*-2cores.json"))
    assert len(paths) == 3
    for path in paths:
        assert json.loads(path.read_text())["schema"] == record.SCHEMA
        assert record.read(path).commit


def test_the_command_contains_no_folders() -> None:
    typed = ["--data", "/home/me/secret/photos", "--json=/srv/private/a.json", "--images", "7"]
    assert record.command(typed) == "python -m bench --data photos --json=a.json --images 7"
    assert record.command(["--data", "."]).split()[-1] == Path.cwd().name
    assert record.command(["--quick"], 4) == "torchrun --nproc-per-node 4 -m bench --quick"


def test_the_commit_is_that_of_this_checkout() -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("this is not a git checkout")
    assert record.commit().removesuffix("-dirty") == head[:12]


def test_the_commit_is_unknown_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git_commit", lambda: None)
    assert record.commit() == "unknown"


def test_only_installed_distributions_have_a_version() -> None:
    assert record.versions(["torch", "no-such-distribution"]).keys() == {"python", "torch"}
