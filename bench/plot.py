"""The plot of docs/throughput.md: the stages of a record, and the peers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import Record
from .stage_names import E2E, STEP
from .tables import number

_RED = "#d1495b"
_GREY = "#8d96a3"
_BLUE = "#2e86ab"


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw a row of two panels for each record: the stages, and the peers.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: `uv sync --group bench`") from None
    figure = Figure(figsize=(11, 3.6 * len(records)), layout="constrained")
    panels = figure.subplots(len(records), 2, squeeze=False)
    for (left, right), result in zip(panels, records, strict=True):
        _draw_stages(left, result)
        _draw_peers(right, result)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_stages(panel: Any, result: Record) -> None:
    """Bars on a logarithmic scale, the first stage on top."""
    stages = result.stages[::-1]
    colours = {E2E: _RED, STEP: _GREY}
    medians = [stage.rates.median for stage in stages]
    bars = panel.barh(
        [stage.name for stage in stages],
        medians,
        color=[colours.get(stage.name, _BLUE) for stage in stages],
    )
    panel.bar_label(bars, [f" {number(median)}" for median in medians])
    panel.set_xscale("log")
    panel.set_xlim(min(medians) / 3, max(medians) * 6)
    panel.set_xlabel("two-view images/s")
    hardware = result.machine.gpu or result.machine.cpu
    panel.set_title(f"{hardware}, {result.settings['threads']} threads")


def _draw_peers(panel: Any, result: Record) -> None:
    """Bars with the ratio to the authors' transform, which is on top."""
    peers = result.peers[::-1]
    colours = [_RED if peer.name.startswith("twinfeed") else _GREY for peer in peers]
    bars = panel.barh(
        [peer.name for peer in peers], [peer.rates.median for peer in peers], color=colours
    )
    panel.bar_label(bars, [f" {peer.ratio:.1f}x" for peer in peers])
    panel.set_xlabel("two-view images/s on one core")
    panel.margins(x=0.15)
