"""Line charts of metrics over the steps of a run, as SVG in HTML figures.

`draw_chart` makes one figure. `report.css` has its colours, and `report.js` shows the values of the
step under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .number_format import format_number
from .run_record import Points

Curves = Mapping[str, Points]

# Size of a chart and its margins, in units of the SVG's view box.
_WIDTH, _HEIGHT = 400, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 22
_PLOT_WIDTH = _WIDTH - _LEFT - _RIGHT
_PLOT_HEIGHT = _HEIGHT - _TOP - _BOTTOM

_MOST_STRIPS = 100  # parts of the x axis that each show the values at their first step
_MOST_POINTS = 480  # of a curve: more than one per unit of the view box cannot be seen


def draw_chart(
    title: str,
    subtitle: str,
    curves: Curves,
    *,
    unit: str = "",
    log: bool = False,
    reach: float = 0.0,
) -> str:
    """An HTML figure with the curves that have values; "" if none has.

    Args:
        title: The name of the chart.
        subtitle: What it shows, or the goal.
        curves: The points of each curve, by name.
        unit: "%" if the values are fractions that are shown as percentages.
        log: Use a logarithmic y axis, which leaves out values that are not above 0.
        reach: A value that a linear y axis includes in any case, as it always does 0.
    """
    drawable = {
        name: points
        for name, points in curves.items()
        if any(_is_shown(value, log) for _, value in points)
    }
    if not drawable:
        return ""

    axes = _fit_axes(drawable, log, reach)
    steps = sorted({step for points in drawable.values() for step, _ in points})
    strips = steps[:: math.ceil(len(steps) / _MOST_STRIPS)]
    readouts = _readouts([*strips, steps[-1]], drawable, unit)
    svg = [
        *_draw_grid(axes, unit),
        *_draw_curves(drawable, axes),
        *_draw_strips(strips, readouts, axes),
    ]
    last_readout = readouts[steps[-1]]
    label = f"{title} over the steps; {last_readout}"
    return (
        f"<figure><figcaption><b>{title}</b> {subtitle}</figcaption>{_legend(drawable)}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(svg)}</svg><output>{last_readout}</output></figure>"
    )


def thin(points: Points, most: int = _MOST_POINTS) -> Points:
    """About `most` points that look the same when they are drawn.

    Each stretch of the curve keeps its lowest and its highest value, and a gap if it has one.
    """
    stretch = max(1, math.ceil(3 * len(points) / most))
    kept: list[tuple[int, float | None]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        values = sorted((value, step) for step, value in part if value is not None)
        extremes = {(step, value) for value, step in (*values[:1], *values[-1:])}
        gap = [point for point in part if point[1] is None][:1]
        kept += sorted([*extremes, *gap], key=lambda point: point[0])
    return kept


@dataclass(frozen=True)
class _Axes:
    """Maps steps and values to coordinates in the view box."""

    last_step: int
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return round(_LEFT + _PLOT_WIDTH * step / self.last_step, 1)

    def y(self, value: float) -> float:
        if self.log:
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return round(_HEIGHT - _BOTTOM - _PLOT_HEIGHT * fraction, 1)

    def x_ticks(self) -> list[float]:
        return _linear_ticks(0, self.last_step)

    def y_ticks(self) -> list[float]:
        if self.log and self.high / self.low > 5:
            return _log_ticks(self.low, self.high)
        return _linear_ticks(self.low, self.high)


def _fit_axes(curves: Curves, log: bool, reach: float) -> _Axes:
    values = [
        value
        for points in curves.values()
        for _, value in points
        if value is not None and _is_shown(value, log)
    ]
    last_step = max(1, *(points[-1][0] for points in curves.values()))
    if log:
        return _Axes(last_step, low=min(values), high=1.01 * max(values), log=True)
    low = min(0.0, *values)
    high = 1.04 * max(reach, *values) or 1.0  # 1 if all values are 0
    return _Axes(last_step, low, high, log=False)


def _is_shown(value: float | None, log: bool) -> bool:
    return value is not None and (value > 0 or not log)


def _linear_ticks(low: float, high: float) -> list[float]:
    """A few round numbers from `low` to `high`."""
    rough = (high - low) / 5.5
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / distance), math.floor(high / distance)
    return [i * distance for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, and their multiples if there are few."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    factors = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(first, last + 1, 1 + (last - first) // 6)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _readouts(steps: Iterable[int], curves: Curves, unit: str) -> dict[int, str]:
    """The values of all curves at each of the steps, in words."""
    words = {step: [f"step {step:,}"] for step in steps}
    for name, points in curves.items():
        for step, value in points:
            if step in words:
                shown = "not finite" if value is None else format_number(value, unit)
                words[step].append(f"{escape(name)} {shown}")
    return {step: ", ".join(parts) for step, parts in words.items()}


def _legend(curves: Curves) -> str:
    if len(curves) < 2:
        return ""
    keys = [f'<span class="s{i}">{escape(name)}</span>' for i, name in enumerate(curves)]
    return f'<p class="keys">{"".join(keys)}</p>'


def _draw_grid(axes: _Axes, unit: str) -> Iterator[str]:
    for tick in axes.y_ticks():
        y = axes.y(tick)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="y" x="{_LEFT - 6}" y="{y}" dy="4">{format_number(tick, unit)}</text>'
    for tick in axes.x_ticks():
        yield f'<text class="x" x="{axes.x(tick)}" y="{_HEIGHT - 5}">{format_number(tick)}</text>'


def _draw_curves(curves: Curves, axes: _Axes) -> Iterator[str]:
    for i, points in enumerate(curves.values()):
        yield f'<path class="s{i}" d="{_path_data(thin(points), axes)}"/>'


def _path_data(points: Points, axes: _Axes) -> str:
    """The path through the points, interrupted where a value cannot be shown."""
    commands = []
    pen_is_down = False
    for step, value in points:
        if value is None or not _is_shown(value, axes.log):
            pen_is_down = False
            continue
        position = f"{axes.x(step)} {axes.y(value)}"
        if pen_is_down:
            commands.append(f"L{position}")
        else:
            commands.append(f"M{position}h0")  # h0 makes a single point visible as a dot
        pen_is_down = True
    return "".join(commands)


def _draw_strips(strips: list[int], readouts: Mapping[int, str], axes: _Axes) -> Iterator[str]:
    """Invisible rectangles over the plot, each with the values at its first step as its title."""
    for step, following in pairwise([*strips, axes.last_step]):
        x = axes.x(step)
        box = f'x="{x}" y="{_TOP}" width="{axes.x(following) - x:.1f}" height="{_PLOT_HEIGHT}"'
        yield f"<rect {box}><title>{readouts[step]}</title></rect>"
