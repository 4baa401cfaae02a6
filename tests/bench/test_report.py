"""Records at the terminal, as Markdown and as a plot, and the page that shows the committed one."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image

from bench import record, report, tables
from bench.record import Record
from bench.stage_names import DECODE
from experiment import Console
from tests.bench.conftest import Bench
from tests.helpers.benchmarks import make_record
from tests.helpers.libraries import import_or_skip
from tests.helpers.runs import assert_refused

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def printed(print_record: Callable[[Record, Console], None], result: Record, width: int) -> str:
    """The output of a function that prints a record, on a terminal of this width."""
    console = Console()
    file = io.StringIO()
    terminal = rich.console.Console(file=file, width=width, highlight=False)
    console.rich = terminal  # type: ignore[assignment]
    print_record(result, console)
    return file.getvalue()


@pytest.mark.parametrize("ranks", [1, 2])
def test_tables_fit_into_80_columns(ranks: int) -> None:
    result = make_record(ranks=ranks)
    text = printed(tables.print_stages, result, width=80)
    lines = text.splitlines()
    stages = [stage.name for stage in result.stages]
    names = stages * ranks + [peer.name for peer in result.peers]
    for name in names:
        rows = [line for line in lines if line.startswith(name + "  ")]
        assert len(rows) == names.count(name)
    assert f"kornia: {'x' * 90}" in "".join(lines).replace("kornia:x", "kornia: x")
    assert "Only 10% of the cold read came from the disk" in text
    assert max(len(line) for line in lines) <= 80
    assert sum("its parts in sequence" in line for line in lines) == len(result.stages)


def test_a_narrow_terminal_cuts_lines_of_tables_and_breaks_none() -> None:
    result = dataclasses.replace(make_record(), peers=[], verdict=[])
    text = printed(tables.print_stages, result, width=45)
    table = text.split("\n\n")[1].splitlines()
    header = 1
    sentence_about_cold_read = 2  # lines
    assert len(table) == header + len(result.stages) + sentence_about_cold_read


def test_the_terminal_shows_all_conversions() -> None:
    result = record.read(RESULTS / "convert-2cores.json")
    text = printed(tables.print_conversions, result, width=80)
    for one in result.conversions:
        assert f"{one.ratio:.2f}" in text
        assert one.name in text


def test_rates_have_three_digits() -> None:
    rates = (103_237.4, 808.2, 74.31, 1.0)
    assert [tables.number(rate) for rate in rates] == ["103,237", "808", "74.3", "1"]


def test_a_row_has_the_rate_per_core_and_the_fraction_of_the_roofline() -> None:
    result = make_record()
    plan, cold_read, _, decode = result.stages[:4]
    fraction = "22% of its parts in sequence"
    assert tables.stage_row(decode, result) == (DECODE, "440", "9%", "220", fraction)
    assert tables.stage_row(plan, result)[3] == "110"  # runs on one core
    assert tables.stage_row(cold_read, result)[3] == ""  # the disk has no cores


@pytest.mark.parametrize("gpu", [False, True])
def test_markdown_has_a_row_for_every_stage_and_peer(gpu: bool) -> None:
    result = make_record(gpu)
    text = report.to_markdown(result)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    header = 2  # lines
    assert len(rows) == header + len(result.stages) + header + len(result.peers)
    assert len({row.count("|") for row in rows}) == 1
    for stage, row in zip(result.stages, rows[header:], strict=False):
        assert row.startswith(f"| {stage.name} | {tables.number(stage.rates.median)} |")
    for peer, row in zip(result.peers, rows[-len(result.peers) :], strict=True):
        assert row.startswith(f"| {peer.name} | {tables.number(peer.rates.median)} |")
        assert f"| {peer.ratio:.2f} |" in row
    words = (result.commit, result.command, "EPYC", "torch 2.15.0", *result.verdict)
    assert all(word in text for word in words)
    assert ("H100 at 700 W" in text) == gpu


def test_records_are_printed_and_drawn(bench: Bench, tmp_path: Path) -> None:
    import_or_skip("matplotlib")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    make_record().write(paths[0])
    dataclasses.replace(make_record(gpu=True), peers=[]).write(paths[1])
    status, text = bench("report", *paths, "--plot", tmp_path / "a.png")
    assert status == 0
    assert text.strip() == "\n\n".join(report.to_markdown(record.read(path)) for path in paths)
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 20


def test_a_missing_record_is_refused(bench: Bench, tmp_path: Path) -> None:
    assert_refused(bench("report", tmp_path / "c.json"), "c.json")


def test_the_page_shows_the_committed_record() -> None:
    paths = sorted(RESULTS.glob("feed-*.json"))
    assert paths
    page = (ROOT / "docs" / "throughput.md").read_text()
    shown = page.partition("<!-- bench -->\n")[2].partition("\n<!-- /bench -->")[0]
    assert shown == "\n\n".join(report.to_markdown(record.read(path)) for path in paths)
