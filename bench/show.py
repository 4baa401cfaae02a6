"""A record at the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from runlog import RunLog

from .record import Record, Rung


def record(result: Record, log: RunLog) -> None:
    """The ladder, the peers and the verdict."""
    m, d, s = result.machine, result.data, result.settings
    gpu = f", {m.gpu} ({m.gpu_power_limit_w or '?'} W)" if m.gpu else ""
    log.say(f"\n{m.cpu}, {m.cores} cores{gpu}; decoder {s['decoder']}, {s['threads']} threads, batch {s['batch_size']}")
    log.say(
        f"{d.images:,} {d.name}: {d.mean_width:.0f} x {d.mean_height:.0f} px, {d.mean_bytes / 1000:.0f} kB; "
        f"two views of {s['size']} px; {s['network']}\n"
    )
    log.console.print(_ladder(result))
    if any(rung.ranks for rung in result.rungs):
        log.console.print(_ranks(result.rungs))
    if result.contenders:
        log.console.print(_contest(result))
    log.say("")
    for sentence in result.verdict:
        log.say(sentence)


def _ladder(result: Record) -> Table:
    table = Table(*("rung", "images/s", "+-", "each", "of its ceiling"), box=None, pad_edge=False)
    for rung in result.rungs:
        table.add_row(*map(Text, row(rung, result)))
    return table


def row(rung: Rung, result: Record) -> tuple[str, str, str, str, str]:
    """Name, rate, spread, rate per core or GPU, and the fraction of the ceiling."""
    cores = {"cores": result.settings["threads"], "one core": 1}.get(rung.on)
    each = "" if rung.on == "disk" else number(rung.rates.median / cores if cores else rung.rates.median)
    reached = f"{rung.rates.median / rung.ceiling:.0%} of {rung.ceiling_is}" if rung.ceiling else ""
    return rung.name, number(rung.rates.median), f"{rung.rates.spread:.0%}", each, reached


def _ranks(rungs: list[Rung]) -> Table:
    count = len(rungs[0].ranks)
    table = Table(
        "rung", f"{count} ranks in sum", "per rank", "one alone", "contention costs", box=None, pad_edge=False
    )
    for rung in rungs:
        total = sum(rates.median for rates in rung.ranks)
        assert rung.alone is not None
        cost = 1 - total / count / rung.alone.median
        table.add_row(rung.name, number(total), number(total / count), number(rung.alone.median), f"{max(0, cost):.0%}")
    return table


def _contest(result: Record) -> Table:
    columns = ("on one core", "images/s", "+-", "ratio", "differs from the paper in")
    table = Table(*columns, box=None, pad_edge=False)
    for c in result.contenders:
        rates = number(c.rates.median), f"{c.rates.spread:.0%}", f"{c.ratio:.2f}"
        table.add_row(Text(c.name), *rates, Text(c.differs))
    return table


def number(rate: float) -> str:
    """Three significant digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
