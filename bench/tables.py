"""Prints records at the terminal, and makes the rows that the terminal and `report.py` share."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from experiment import Console

from .record import ConversionRate, PeerResult, Rates, Record, StageResult, StepResult

# On several lines, so that columns are as narrow as their figures.
STEP_HEADERS = (
    "step",
    "batch",
    "images/s",
    "±",
    "ms",
    "vs\nauthors",
    "GiB",
    "% of\nmemory\nbound",
    "% of\ncompute\nbound",
)
STEP_COLUMNS = (
    "vs authors: the rate / the rate of the authors' step or loss. Memory bound: the rate that the "
    "memory traffic allows without fusion. Compute bound: the rate that the matrix products allow."
)
ROOFLINE_HEADER = "roofline reached"

_NOT_FROM_DISK = 0.9  # a cold read with a lower fraction from the disk is pointed out


def print_stages(result: Record, console: Console) -> None:
    """Print what `python -m bench` measured: the stages, the peers and the verdict."""
    _print_conditions(result, console)
    per_unit = "per core or GPU" if result.machine.gpu else "per core"
    headers = ("stage", "images/s", "±", per_unit, ROOFLINE_HEADER)
    rows = [stage_row(stage, result) for stage in result.stages]
    console.rich.print(_table(headers, rows))

    from_disk = result.settings["cold_read_from_disk"]
    if from_disk is not None and from_disk < _NOT_FROM_DISK:
        console.print(
            f"Only {from_disk:.0%} of the cold read came from the disk: "
            "the system keeps the files in its memory."
        )
    if result.settings["ranks"] > 1:
        console.print("")
        console.rich.print(_rank_table(result.stages))
    if result.peers:
        _print_peers(result.peers, console)
    console.print("")
    for sentence in result.verdict:
        console.print(sentence)


def _print_conditions(result: Record, console: Console) -> None:
    settings = result.settings
    data = result.data
    console.print(
        f"\n{_hardware(result)}; decoder {settings['decoder']}, {settings['threads']} threads, "
        f"batch {settings['batch_size']}"
    )
    console.print(
        f"{data.images:,} {data.name}: {data.mean_width:.0f} x {data.mean_height:.0f} px, "
        f"{data.mean_bytes / 1000:.0f} kB; two views of {settings['size']} px; "
        f"{settings['network']}\n"
    )


def _print_peers(peers: Sequence[PeerResult], console: Console) -> None:
    console.print("")
    headers = ("two views on one core", "images/s", "±", "times the authors' rate")
    console.rich.print(_table(headers, [ratio_row(peer.name, peer) for peer in peers]))
    console.print("\nDifferences from the paper:")
    for peer in peers:
        if peer.differs:
            console.print(f"  {peer.name}: {peer.differs}")


def print_conversions(result: Record, console: Console) -> None:
    """Print what `python -m bench convert` measured."""
    data = result.data
    console.print(
        f"\n{_hardware(result)}; {data.images:,} {data.name}, {data.mean_bytes / 1000:.0f} kB\n"
    )
    headers = ("conversion", "images/s", "±", "times FFCV's rate")
    console.rich.print(_table(headers, [ratio_row(one.name, one) for one in result.conversions]))


def print_steps(result: Record, console: Console) -> None:
    """Print what `python -m bench step` measured."""
    settings = result.settings
    console.print(
        f"\n{_hardware(result)}; {settings['network']}; the loss at D {settings['loss']['d']}"
    )
    console.print(f"{STEP_COLUMNS}\n")
    table = _table(STEP_HEADERS, [step_row(step, result) for step in result.steps])
    table.collapse_padding = True  # for terminals of 80 columns
    console.rich.print(table)
    console.print("")
    for sentence in [*settings["skipped"], *result.verdict]:
        console.print(sentence)


def stage_row(stage: StageResult, result: Record) -> tuple[str, ...]:
    """Name, rate, spread, rate per core or GPU, and the fraction of the roofline."""
    cores = {"cores": result.settings["threads"], "one core": 1}.get(stage.resource, 1)
    per_unit = ""
    if stage.resource not in ("disk", "bus"):
        per_unit = number(stage.rates.median / cores)
    reached = ""
    if stage.roofline:
        reached = f"{stage.rates.median / stage.roofline:.0%} of {stage.roofline_name}"
    return stage.name, *_rate_and_spread(stage.rates), per_unit, reached


def ratio_row(name: str, result: PeerResult | ConversionRate) -> tuple[str, ...]:
    """Name, rate, spread, and the ratio to what it is compared with."""
    return name, *_rate_and_spread(result.rates), f"{result.ratio:.2f}"


def step_row(step: StepResult, result: Record) -> tuple[str, ...]:
    """A row under STEP_HEADERS. The loss alone has no rooflines."""
    fractions = ["", ""]
    if "loss," not in step.name:
        bounds = [
            result.bounds[f"memory traffic, {step.precision}"],
            result.bounds[f"multiplications, {step.precision}"],
        ]
        fractions = [f"{step.rates.median / bound:.0%}" for bound in bounds]
    return (
        step.name,
        str(step.batch_size),
        *_rate_and_spread(step.rates),
        number(step.ms),
        "" if step.ratio is None else f"{step.ratio:.2f}",
        "" if step.memory_gib is None else f"{step.memory_gib:.3g}",
        *fractions,
    )


def _rank_table(stages: Sequence[StageResult]) -> Table:
    ranks = len(stages[0].ranks)
    headers = ("stage", f"{ranks} ranks in total", "per rank", "one alone", "lost to contention")
    return _table(headers, [_rank_row(stage) for stage in stages])


def _rank_row(stage: StageResult) -> tuple[str, ...]:
    assert stage.alone is not None
    return (
        stage.name,
        number(stage.total),
        number(stage.total / len(stage.ranks)),
        number(stage.alone.median),
        f"{max(0.0, stage.contention):.0%}",
    )


def _rate_and_spread(rates: Rates) -> tuple[str, str]:
    return number(rates.median), f"{rates.spread:.0%}"


def _hardware(result: Record) -> str:
    machine = result.machine
    text = f"{machine.cpu}, {machine.cores} cores"
    if machine.gpu:
        text += f", {machine.gpu} ({machine.gpu_power_limit_w or '?'} W)"
    return text


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Figures are aligned to the right. A narrow terminal cuts lines and never breaks them."""
    table = Table(box=None, pad_edge=False)
    for column, header in enumerate(headers):
        is_text = column == 0 or header == ROOFLINE_HEADER
        table.add_column(header, justify="left" if is_text else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))
    return table


def number(rate: float) -> str:
    """A rate with three significant digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
