"""`python -m bench report`: records as the tables and the plot of docs/throughput.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from . import record, tables
from .record import Record
from .verdict import E2E, STEP

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Report:
    """Prints records of the bench as Markdown, and draws them."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Records, as `python -m bench --json` writes them [default: bench/results/feed-*.json]."""
    plot: Path | None = None
    """Picture to draw, for example docs/throughput.png. Needs the dependency group `bench`."""


def main(arguments: list[str]) -> int:
    config = tyro.cli(Report, args=arguments, prog="python -m bench report")
    files = config.files or tuple(sorted((_ROOT / "bench" / "results").glob("feed-*.json")))
    records = [record.read(path) for path in files]
    if not records:
        raise ValueError(
            "there are no records in bench/results: make one with `python -m bench --json FILE`"
        )
    print("\n\n".join(map(rendered, records)))
    if config.plot:
        draw([result for result in records if result.rungs], config.plot)
    return 0


def rendered(result: Record) -> str:
    """By what was measured."""
    return (steps if result.steps else markdown if result.rungs else conversions)(result)


def steps(result: Record) -> str:
    """What `python -m bench step` has measured."""
    s = result.settings
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    said = " ".join([*(f"{what}." for what in s["skipped"]), *result.verdict])
    lines = [
        f"{_where(result)}; {s['network']}; the loss at D {s['loss']['d']} ({versions}).",
        "",
        *_table(tables.STEP_HEADERS, [tables.row_of_step(step, result) for step in result.steps]),
        "",
        tables.STEP_COLUMNS,
        "",
        said,
    ]
    return "\n".join(lines)


def markdown(result: Record) -> str:
    """The ladder, the peers and the verdict."""
    m, s = result.machine, result.settings
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        f"{_where(result)}; decoder {s['decoder']}, batch {s['batch_size']}, {s['network']} ({versions}).",
        "",
        *_table(
            ("rung", "images/s", "±", "per core" if not m.gpu else "per core or GPU", "reaches"),
            [tables.row(rung, result) for rung in result.rungs],
        ),
        "",
        " ".join(result.verdict),
    ]
    if result.contenders:
        rows = [
            (
                c.name,
                tables.number(c.rates.median),
                f"{c.rates.spread:.0%}",
                f"{c.ratio:.2f}",
                c.differs or "nothing",
            )
            for c in result.contenders
        ]
        headers = (
            "two views on one core",
            "images/s",
            "±",
            "to the authors'",
            "differs from the paper in",
        )
        lines += ["", *_table(headers, rows)]
    return "\n".join(lines)


def conversions(result: Record) -> str:
    """What `python -m bench convert` has measured."""
    rows = [
        (
            c.name,
            tables.number(c.rates.median),
            f"{c.rates.spread:.0%}",
            f"{c.ratio:.2f}",
            c.differs or "itself",
        )
        for c in result.contenders
    ]
    lines = [
        f"{_where(result)}.",
        "",
        *_table(("conversion", "images/s", "±", "ratio", "to that of"), rows),
    ]
    return "\n".join(lines)


def _where(result: Record) -> str:
    """The command, the machine and the images."""
    m, d = result.machine, result.data
    gpu = (
        f", {m.gpu} at {m.gpu_power_limit_w:.0f} W"
        if m.gpu and m.gpu_power_limit_w
        else f", {m.gpu}"
        if m.gpu
        else ""
    )
    return (
        f"`{result.command}` at {result.commit}: {m.cpu}, {m.cores} cores{gpu}; {d.images:,} {d.name} of "
        f"{d.mean_width:.0f} x {d.mean_height:.0f} px and {d.mean_bytes / 1000:.0f} kB"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *("---:" for _ in headers[1:-1]), "---"]
    return [f"| {' | '.join(cells)} |" for cells in (headers, aligned, *rows)]


def draw(records: Sequence[Record], path: Path) -> None:
    """A row of two panels for each record: the ladder on a logarithmic scale, and the contest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: `uv sync --group bench`") from None
    figure = Figure(figsize=(11, 3.6 * len(records)), layout="constrained")
    for panels, result in zip(
        figure.subplots(len(records), 2, squeeze=False), records, strict=True
    ):
        left, right = panels
        rungs = result.rungs[::-1]
        colours = [
            "#d1495b" if rung.name == E2E else "#8d96a3" if rung.name == STEP else "#2e86ab"
            for rung in rungs
        ]
        medians = [rung.rates.median for rung in rungs]
        bars = left.barh([rung.name for rung in rungs], medians, color=colours)
        left.bar_label(bars, [f" {tables.number(median)}" for median in medians])
        left.set_xscale("log")
        left.set_xlim(min(medians) / 3, max(medians) * 6)
        left.set_xlabel("two-view images/s")
        left.set_title(
            f"{result.machine.gpu or result.machine.cpu}, {result.settings['threads']} threads"
        )
        contenders = result.contenders[::-1]
        ours = ["#d1495b" if c.name.startswith("twinfeed") else "#8d96a3" for c in contenders]
        bars = right.barh(
            [c.name for c in contenders], [c.rates.median for c in contenders], color=ours
        )
        right.bar_label(bars, [f" {c.ratio:.1f}x" for c in contenders])
        right.set_xlabel("two-view images/s on one core")
        right.margins(x=0.15)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
