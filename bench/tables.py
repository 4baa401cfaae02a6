"""A record at the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from experiment import Console

from .record import Contender, Record, Rung, Step


def record(result: Record, console: Console) -> None:
    """The ladder, the peers and the verdict."""
    m, d, s = result.machine, result.data, result.settings
    gpu = f", {m.gpu} ({m.gpu_power_limit_w or '?'} W)" if m.gpu else ""
    console.print(
        f"\n{m.cpu}, {m.cores} cores{gpu}; decoder {s['decoder']}, {s['threads']} threads, batch {s['batch_size']}"
    )
    console.print(
        f"{d.images:,} {d.name}: {d.mean_width:.0f} x {d.mean_height:.0f} px, {d.mean_bytes / 1000:.0f} kB; "
        f"two views of {s['size']} px; {s['network']}\n"
    )
    each = "per core or GPU" if m.gpu else "per core"
    console.rich.print(
        _table(
            ("rung", "images/s", "+-", each, "reaches"),
            [row(rung, result) for rung in result.rungs],
        )
    )
    if (read := s["cold_read_from_disk"]) is not None and read < 0.9:
        console.print(
            f"Only {read:.0%} of the cold read came from the disk: the system keeps the files in its memory."
        )
    if s["ranks"] > 1:
        console.print("")
        console.rich.print(_ranks(result.rungs))
    if result.contenders:
        console.print("")
        contest = [
            (c.name, number(c.rates.median), f"{c.rates.spread:.0%}", f"{c.ratio:.2f}")
            for c in result.contenders
        ]
        console.rich.print(_table(("two views on one core", "images/s", "+-", "ratio"), contest))
        console.print("\nWhat differs from the paper:")
        for c in result.contenders:
            if c.differs:
                console.print(f"  {c.name}: {c.differs}")
    console.print("")
    for sentence in result.verdict:
        console.print(sentence)


def conversions(result: Record, console: Console) -> None:
    """What `python -m bench convert` has measured."""
    m, d = result.machine, result.data
    console.print(
        f"\n{m.cpu}, {m.cores} cores; {d.images:,} {d.name}, {d.mean_bytes / 1000:.0f} kB\n"
    )
    rows = [
        (c.name, number(c.rates.median), f"{c.rates.spread:.0%}", f"{c.ratio:.2f}")
        for c in result.contenders
    ]
    console.rich.print(_table(("conversion", "images/s", "+-", "to FFCV's"), rows))


STEP_HEADERS = ("step", "batch", "images/s", "+-", "ms", "ratio", "GiB", "bytes", "flop")
STEP_COLUMNS = (
    "Ratio: of the rate to the authors'. Bytes, flop: the rate as a fraction of what the memory allows operation "
    "by operation, and of what the multiplications allow."
)


def steps(result: Record, console: Console) -> None:
    """What `python -m bench step` has measured."""
    m, loss = result.machine, result.settings["loss"]
    gpu = f", {m.gpu} ({m.gpu_power_limit_w or '?'} W)" if m.gpu else ""
    console.print(
        f"\n{m.cpu}, {m.cores} cores{gpu}; {result.settings['network']}; the loss at D {loss['d']}"
    )
    console.print(f"{STEP_COLUMNS}\n")
    console.rich.print(_table(STEP_HEADERS, [row_of_step(step, result) for step in result.steps]))
    console.print("")
    for sentence in [*result.settings["skipped"], *result.verdict]:
        console.print(sentence)


def row_of_step(step: Step, result: Record) -> tuple[str, ...]:
    """Under STEP_HEADERS. For the loss alone there are no rooflines."""
    bounds = (
        result.bounds[f"{what}, {step.precision}"] for what in ("memory traffic", "multiplications")
    )
    reached = (
        ("", "")
        if "loss," in step.name
        else (f"{step.rates.median / bound:.0%}" for bound in bounds)
    )
    ratio = "" if step.ratio is None else f"{step.ratio:.2f}"
    memory = "" if step.memory_gib is None else f"{step.memory_gib:.3g}"
    figures = (
        number(step.rates.median),
        f"{step.rates.spread:.0%}",
        number(step.ms),
        ratio,
        memory,
    )
    return step.name, str(step.batch_size), *figures, *reached


def row(rung: Rung, result: Record) -> tuple[str, str, str, str, str]:
    """Name, rate, spread, rate per core or GPU, and the fraction of the ceiling."""
    cores = {"cores": result.settings["threads"], "one core": 1}.get(rung.on, 1)
    each = "" if rung.on in ("disk", "bus") else number(rung.rates.median / cores)
    reached = f"{rung.rates.median / rung.ceiling:.0%} of {rung.ceiling_is}" if rung.ceiling else ""
    return rung.name, number(rung.rates.median), f"{rung.rates.spread:.0%}", each, reached


def _ranks(rungs: Sequence[Rung]) -> Table:
    count = len(rungs[0].ranks)
    headers = ("rung", f"{count} ranks in sum", "per rank", "one alone", "contention costs")
    return _table(headers, [_row_of_ranks(rung, count) for rung in rungs])


def _row_of_ranks(rung: Rung, count: int) -> tuple[str, ...]:
    assert rung.alone is not None
    rates = (rung.total, rung.total / count, rung.alone.median)
    return rung.name, *map(number, rates), f"{max(0.0, rung.contention):.0%}"


def _row_of_contest(c: Contender) -> tuple[str, ...]:
    return c.name, number(c.rates.median), f"{c.rates.spread:.0%}", f"{c.ratio:.2f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Figures to the right. A line is never broken: on a narrow terminal it is cut."""
    table = Table(box=None, pad_edge=False)
    for i, header in enumerate(headers):
        figure = i > 0 and header != "reaches"
        table.add_column(header, justify="right" if figure else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def number(rate: float) -> str:
    """Three significant digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
