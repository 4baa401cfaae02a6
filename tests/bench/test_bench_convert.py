"""`python -m bench convert`: every way is measured and is in the record and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import convert, record, report
from tests.helpers.libraries import needed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_conversions_are_measured_recorded_and_reported(photos: Path, tmp_path: Path) -> None:
    """In a process of its own, as it is typed: FFCV forks workers."""
    needed("ffcv")
    command = [
        sys.executable,
        "-m",
        "bench",
        "convert",
        "--data",
        str(photos),
        "--turns",
        "2",
        "--json",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "a.json")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = record.read(tmp_path / "a.json")
    assert result.command == "python -m bench convert --data photos0 --turns 2 --json a.json"
    assert (result.data.images, result.rungs) == (60, [])
    names = [c.name for c in result.contenders]
    assert names[0] == "FFCV's writer"
    assert len(names) == 7
    for c in result.contenders:
        assert len(c.rates.images_per_s) == 2
        assert c.rates.median > 0
        assert (c.ratio == 1) == (not c.differs)
        assert c.name in done.stdout
        assert c.name in report.conversions(result)
    assert {"ffcv", "simplejpeg", "python"} <= result.versions.keys()


def test_ffcvs_beton_is_whole(photos: Path, tmp_path: Path) -> None:
    """What it is timed for is what is wanted of it."""
    needed("ffcv")
    code = (
        "import sys; from pathlib import Path; from bench.convert import ffcv_write\n"
        "ffcv_write(sorted(map(str, Path(sys.argv[1]).rglob('*.jpg'))), sys.argv[2], 50)"
    )
    target = tmp_path / "x.beton"
    subprocess.run(
        [sys.executable, "-c", code, str(photos), str(target)], cwd=ROOT, check=True, timeout=300
    )
    from pipeline import open_store

    store = open_store(target)
    assert len(store) == 60
    assert max(store.index["height"].max(), store.index["width"].max()) == 50


def test_a_folder_without_jpegs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no JPEG"):
        convert.main(["--data", str(tmp_path)], None)  # type: ignore[arg-type]


def test_the_committed_record_is_of_two_thousand_images() -> None:
    for path in (ROOT / "bench" / "results").glob("convert-*.json"):
        assert json.loads(path.read_text())["data"]["images"] >= 2000
