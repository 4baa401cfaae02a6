"""`python -m bench report`: records as the tables of docs/throughput.md, and as a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiment.options import DEFAULT_IN_HELP

from . import record, tables
from .record import PeerResult, Record

_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class ReportOptions:
    """Prints benchmark results as Markdown tables, and plots them."""

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], DEFAULT_IN_HELP] = ()
    """Results that `python -m bench --json` has written [default: bench/results/feed-*.json]."""
    plot: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Picture to draw, for example docs/throughput.png. Needs the dependency group `bench`."""


def main(arguments: list[str]) -> int:
    """Print the records; draw those that have stages if asked to."""
    options = tyro.cli(ReportOptions, args=arguments, prog="python -m bench report")
    files = options.files or tuple(sorted(_RESULTS.glob("feed-*.json")))
    records = [record.read(path) for path in files]
    if not records:
        raise ValueError(
            "there are no records in bench/results: make one with `python -m bench --json FILE`"
        )
    print("\n\n".join(to_markdown(result) for result in records))
    if options.plot:
        from .plot import draw

        draw([with_current_names(result) for result in records if result.stages], options.plot)
    return 0


def to_markdown(result: Record) -> str:
    """The record as Markdown, whichever command made it."""
    result = with_current_names(result)
    if result.steps:
        return _steps(result)
    if result.conversions:
        return _conversions(result)
    return _stages(result)


def with_current_names(result: Record) -> Record:
    """The record with the current name of the decoder `cpu`, formerly `torchvision`."""
    settings = result.settings
    if settings.get("decoder") == "torchvision":
        settings = {**settings, "decoder": "cpu"}
    peers = [
        dataclasses.replace(
            peer, name=peer.name.replace("twinfeed, torchvision", "twinfeed, cpu", 1)
        )
        for peer in result.peers
    ]
    return dataclasses.replace(result, settings=settings, peers=peers)


def _stages(result: Record) -> str:
    settings = result.settings
    per_unit = "per core or GPU" if result.machine.gpu else "per core"
    headers = ("stage", "images/s", "±", per_unit, tables.ROOFLINE_HEADER)
    lines = [
        f"{_origin(result)}; decoder {settings['decoder']}, batch {settings['batch_size']}, "
        f"{settings['network']} ({_versions(result)}).",
        "",
        *_table(headers, [tables.stage_row(stage, result) for stage in result.stages]),
        "",
        " ".join(result.verdict),
    ]
    if result.peers:
        lines += ["", *_peer_table(result.peers)]
    return "\n".join(lines)


def _peer_table(peers: Sequence[PeerResult]) -> list[str]:
    headers = (
        "two views on one core",
        "images/s",
        "±",
        "times the authors' rate",
        "differs from the paper in",
    )
    rows = [(*tables.ratio_row(peer.name, peer), peer.differs or "nothing") for peer in peers]
    return _table(headers, rows)


def _conversions(result: Record) -> str:
    headers = ("conversion", "images/s", "±", "ratio", "compared with")
    rows = []
    for one in result.conversions:
        against = "itself" if one.against == one.name else one.against
        rows.append((*tables.ratio_row(one.name, one), against))
    return "\n".join([f"{_origin(result)}.", "", *_table(headers, rows)])


def _steps(result: Record) -> str:
    settings = result.settings
    headers = [header.replace("\n", " ") for header in tables.STEP_HEADERS]
    skipped = [f"{line}." for line in settings["skipped"]]
    lines = [
        f"{_origin(result)}; {settings['network']}; the loss at D {settings['loss']['d']} "
        f"({_versions(result)}).",
        "",
        *_table(headers, [tables.step_row(step, result) for step in result.steps]),
        "",
        tables.STEP_COLUMNS,
        "",
        " ".join([*skipped, *result.verdict]),
    ]
    return "\n".join(lines)


def _origin(result: Record) -> str:
    """The command, the machine and the images."""
    data = result.data
    return (
        f"`{result.command}` at {result.commit}: {_hardware(result)}; {data.images:,} {data.name} "
        f"of {data.mean_width:.0f} x {data.mean_height:.0f} px and {data.mean_bytes / 1000:.0f} kB"
    )


def _hardware(result: Record) -> str:
    machine = result.machine
    text = f"{machine.cpu}, {machine.cores} cores"
    if machine.gpu:
        text += f", {machine.gpu}"
    if machine.gpu and machine.gpu_power_limit_w:
        text += f" at {machine.gpu_power_limit_w:.0f} W"
    return text


def _versions(result: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: the first and last columns are text, the others figures."""
    alignment = ["---", *("---:" for _ in headers[1:-1]), "---"]
    return [f"| {' | '.join(cells)} |" for cells in (headers, alignment, *rows)]
