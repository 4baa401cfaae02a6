"""`python -m bench convert`: every conversion is measured, recorded and reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from bench import convert, record, report
from tests.helpers.libraries import import_or_skip

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_conversions_are_measured_recorded_and_reported(photos: Path, tmp_path: Path) -> None:
    """In a process of its own, since FFCV forks workers."""
    import_or_skip("ffcv")
    command = [sys.executable, "-m", "bench", "convert", "--data", str(photos), "--rounds", "2"]
    json = ["--json", str(tmp_path / "a.json")]
    done = subprocess.run([*command, *json], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = record.read(tmp_path / "a.json")
    assert result.command == "python -m bench convert --data photos0 --rounds 2 --json a.json"
    assert result.data.images == 60
    assert (result.stages, result.peers) == ([], [])
    assert len(result.conversions) == 7
    assert result.conversions[0].name == "FFCV's writer"
    table = report.to_markdown(result)
    for one in result.conversions:
        assert len(one.rates.images_per_s) == 2
        assert one.rates.median > 0
        assert (one.ratio == 1) == (one.against == one.name)
        assert one.name in done.stdout
        assert one.name in table
    assert {"ffcv", "simplejpeg", "python"} <= result.versions.keys()
    assert not list(photos.parent.glob("twinfeed-*"))  # temporary folders are removed


def test_ffcvs_beton_is_complete(photos: Path, tmp_path: Path) -> None:
    """FFCV's writer is timed for a file that holds every image, reduced as asked for."""
    import_or_skip("ffcv")
    code = (
        "import sys; from pathlib import Path; from bench.ffcv_writer import write_beton\n"
        "write_beton(sorted(map(str, Path(sys.argv[1]).rglob('*.jpg'))), sys.argv[2], 50)"
    )
    target = tmp_path / "x.beton"
    command = [sys.executable, "-c", code, str(photos), str(target)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    store = pipeline.open_store(target)
    assert len(store) == 60
    assert max(store.index["height"].max(), store.index["width"].max()) == 50


def test_a_folder_without_jpegs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no JPEG"):
        convert.main(["--data", str(tmp_path)], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["--turns", "0"], "--rounds is 0: it must be at least 1"),  # the option's former name
        (["--images", "0"], "--images is 0"),
        (["--json", "/"], "--json is /"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.main(arguments, None)  # type: ignore[arg-type]


def test_committed_records_are_of_two_thousand_images() -> None:
    paths = list((ROOT / "bench" / "results").glob("convert-*.json"))
    assert paths
    for path in paths:
        assert record.read(path).data.images >= 2000
