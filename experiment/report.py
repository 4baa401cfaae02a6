"""The page that a run writes about itself, `report.html`: is it well, how did it go, what is it.

One file that needs no other and no network, made of whatever the run's folder holds by now.
"""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from .command import explain
from .health import STARVED, TONES, Points, Run, figure, read_run, verdict
from .presets import Pretrain

_SIGNS = dict(zip(TONES, "✕!✓·", strict=True))
_HEADLINES = dict(
    zip(TONES, ("Something is wrong", "Needs a look", "Healthy", "Nothing to say yet"), strict=True)
)
_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 190, 44, 10, 8, 22  # of a chart, and of its margins


def main() -> None:
    """`python -m experiment.report RUN`"""
    try:
        print(
            tyro.cli(
                write_report,
                prog="python -m experiment.report",
                config=(tyro.conf.PositionalRequiredArgs,),
            )
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {explain(error)}")


def write_report(run: Path) -> Path:
    """Write RUN/report.html, the page about the run in a folder, while it runs or afterwards."""
    temporary = run / "report.html.tmp"
    temporary.write_text(_page(read_run(run)), "utf-8", "backslashreplace")
    return temporary.replace(run / "report.html")


# ── curves and pictures ──────────────────────────────────────────────────────────────────────────────────────────────


def chart(
    title: str,
    goal: str,
    curves: dict[str, Points],
    unit: str = "",
    log: bool = False,
    top: float = 0,
) -> str:
    """A figure with those of the curves that there is something of, and "" where there is nothing.

    unit: "%" for fractions. log: a logarithmic axis. top: a value that a linear one reaches in any case, as it does 0.
    """
    floor = 0.0 if log else -math.inf
    curves = {
        name: points
        for name, points in curves.items()
        if any(v is not None and v > floor for _, v in points)
    }
    values = [v for points in curves.values() for _, v in points if v is not None and v > floor]
    if not values:
        return ""
    last = max(1, *(points[-1][0] for points in curves.values()))
    low, high = (
        (min(values), 1.01 * max(values))
        if log
        else (min(0.0, *values), 1.04 * max(top, *values) or 1.0)
    )

    def x(step: float) -> float:
        return round(_LEFT + (_W - _LEFT - _RIGHT) * step / last, 1)

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return round(_H - _BOTTOM - (_H - _BOTTOM - _TOP) * part, 1)

    drawn = []
    for tick in _ticks(low, high, log):
        drawn.append(f'<line x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        drawn.append(
            f'<text class="y" x="{_LEFT - 6}" y="{y(tick)}" dy="4">{figure(tick, unit)}</text>'
        )
    drawn += [
        f'<text class="x" x="{x(tick)}" y="{_H - 5}">{figure(tick)}</text>'
        for tick in _ticks(0, last)
    ]
    steps = sorted({step for points in curves.values() for step, _ in points})
    strips = steps[:: -(-len(steps) // 100)]  # touched, each says what is read off at its beginning
    read = {step: f"step {step:,}" for step in (*strips, steps[-1])}
    for number, (name, points) in enumerate(curves.items()):
        path, pen = "", "M"
        for step, value in thinned(points):
            if shown := value is not None and value > floor:
                path += f"{pen}{x(step)} {y(value)}" + "h0" * (pen == "M")  # a lone point is a dot
            pen = "L" if shown else "M"
        drawn.append(f'<path class="s{number}" d="{path}"/>')
        for step, value in points:
            if step in read:
                read[step] += (
                    f", {escape(name)} {'not finite' if value is None else figure(value, unit)}"
                )
    for step, following in zip(strips, [*strips[1:], last], strict=True):
        box = f'x="{x(step)}" y="{_TOP}" width="{x(following) - x(step):.1f}" height="{_H - _TOP - _BOTTOM}"'
        drawn.append(f"<rect {box}><title>{read[step]}</title></rect>")
    keys = "".join(
        f'<span class="s{number}">{escape(name)}</span>' for number, name in enumerate(curves)
    )
    keys = f'<p class="keys">{keys}</p>' if len(curves) > 1 else ""
    return (
        f'<figure><figcaption><b>{title}</b> {goal}</figcaption>{keys}<svg viewBox="0 0 {_W} {_H}" '
        f'role="img" aria-label="{title} over the steps; {read[steps[-1]]}">{"".join(drawn)}</svg>'
        f"<output>{read[steps[-1]]}</output></figure>"
    )


def thinned(points: Points, most: int = 480) -> Points:
    """About `most` of the points at most: the lowest and the highest of each stretch, and a gap where there is one."""
    stretch = max(1, -(-3 * len(points) // most))
    kept: list[tuple[int, float | None]] = []
    for part in (points[start : start + stretch] for start in range(0, len(points), stretch)):
        finite = sorted((value, step) for step, value in part if value is not None)
        ends = {(step, value) for value, step in (*finite[:1], *finite[-1:])}
        gap = [point for point in part if point[1] is None][:1]
        kept += sorted((*ends, *gap), key=lambda point: point[0])
    return kept


def _ticks(low: float, high: float, log: bool = False) -> Iterable[float]:
    """A few round numbers."""
    if log and high / low > 5:
        first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
        factors = (1, 2, 5) if high / low < 200 else (1,)
        powers = range(first, last + 1, 1 + (last - first) // 6)
        return [
            f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high
        ]
    rough = (high - low) / 5.5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _picture(image: Image.Image, kind: str, alt: str) -> str:
    image.save(buffer := io.BytesIO(), "PNG" if image.mode == "RGBA" else "JPEG", quality=85)
    return f'<img class="{kind}" alt="{alt}" src="data:image;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _matrices(run: Run) -> str:
    """Corners of the cross-correlation matrix at up to six steps: blue above 0, red below, transparent at 0."""
    files = sorted(path for path in run.folder.glob("correlation/*.npy") if path.stem.isdecimal())
    found = ""
    for path in (files[round(i)] for i in np.linspace(0, len(files) - 1, min(6, len(files)))):
        with suppress(OSError, ValueError, EOFError):  # not written to its end
            value = np.nan_to_num(np.load(path).astype(np.float32)).clip(-1, 1)
            colour = np.where(value[..., None] > 0, (42, 120, 214), (208, 72, 56))
            pixels = np.concatenate([colour, np.rint(255 * abs(value[..., None]))], axis=2).astype(
                np.uint8
            )
            step = f"step {int(path.stem):,}"
            picture = _picture(Image.fromarray(pixels), "matrix", f"matrix at {step}")
            found += f"<figure>{picture}<figcaption>{step}</figcaption></figure>"
    explained = "A corner of C: how each dimension of view a (row) correlates with each of view b (column). "
    explained += "The goal is the identity, a blue diagonal and nothing beside it."
    return (
        found
        and f'<p>{explained}</p><div class="matrices">{found}</div><p class="scale">-1 <i></i> 1</p>'
    )


def _views(run: Run) -> str:
    with suppress(OSError):
        image = Image.open(run.folder / "views.png").convert("RGB")
        image.thumbnail((1600, 1600))
        text = "From top to bottom: an image, its view a, its view b. They should be hard, and still show one thing."
        return f"<p>{text}</p>{_picture(image, 'views', 'images and their views')}"
    return ""


# ── page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _page(run: Run) -> str:
    name, (word, rest), findings = escape(run.folder.resolve().name), run.status(), verdict(run)
    done = 1.0 if run.summary else min(1.0, run.step / run.steps) if run.steps else 0.0
    tone = findings[0][0]
    health = "".join(
        f'<li class="{tone}"><i>{_SIGNS[tone]}</i><p><b>{escape(title)}.</b> {escape(text)}</p></li>'
        for tone, title, text in findings
    )
    groups = {
        setting.name: group for group, part in vars(Pretrain()).items() for setting in fields(part)
    }
    settings: dict[str, dict[str, Any]] = {"run": {}}
    for setting, value in run.config.items():
        settings.setdefault(groups.get(setting, "run"), {})[setting] = value
    sections = {
        "Curves": _charts(run),
        "Cross-correlation": _matrices(run),
        "Views": _views(run),
        "Configuration": _tables(settings),
        "Environment": _tables({"": run.environment}),
    }
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<header><h1>{name}</h1><p>{escape(str(run.config.get('preset', 'run')))} · <b>{word}</b> {rest}</p>"
        f'<div class="progress"><i style="width:{done:.1%}"></i></div>'
        f'<p class="faint">ConversionProgress {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p></header>'
        f'<section class="verdict"><h2 class="{tone}">{_HEADLINES[tone]}</h2><ul>{health}</ul></section>'
        f"<dl>{_tiles(run)}</dl>"
        + "".join(
            f"<section><h2>{title}</h2>{part or 'Nothing yet.'}</section>"
            for title, part in sections.items()
        )
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _tiles(run: Run) -> str:
    shown = {
        "epoch": ("epoch", 1, ""),
        "loss": ("loss", 1, ""),
        "diagonal of C": ("diagonal_mean", 1, ""),
        "rest of C, RMS": ("off_diagonal_rms", 1, ""),
        "effective rank": ("effective_rank", 1, ""),
        "kNN top-1": ("knn_top1", 0.01, "%"),
        "linear probe": ("probe_top1", 0.01, "%"),
        "images/s": ("images_per_s", 1, ""),
        "data wait": ("data_wait_fraction", 1, "%"),
    }
    return "".join(
        f"<div><dt>{title}</dt><dd>{figure(factor * values[-1], unit)}</dd></div>"
        for title, (name, factor, unit) in shown.items()
        if (values := run.values(name))
    )


def _charts(run: Run) -> str:
    points, scale, lambd = run.points, run.setting("loss_scale") or 1.0, run.setting("lambd") or 0.0
    loss = {"loss": points("loss"), "invariance": points("invariance", scale)}
    loss["λ · redundancy"] = points("redundancy", scale * lambd)
    agreement = {
        "diagonal, mean": points("diagonal_mean"),
        "the rest, RMS": points("off_diagonal_rms"),
    }
    accuracy = {"kNN": points("knn_top1", 0.01), "linear probe": points("probe_top1", 0.01)}
    rates = {"weights": points("lr"), "biases and batch norm": points("lr_biases")}
    charts = (
        chart("Loss", "and its two parts", loss, log=True)
        + chart("Cross-correlation", "diagonal to 1, the rest to 0", agreement, top=1)
        + chart("Accuracy", "top-1 of held-out images", accuracy, "%")
        + chart(
            "Effective rank", "of the features; 1 is collapse", {"rank": points("effective_rank")}
        )
        + chart(
            "Feature deviation",
            "between images; 0 is collapse",
            {"deviation": points("feature_deviation")},
        )
        + chart("Learning rate", "", rates, log=True)
        + chart("Speed", "of training", {"images/s": points("images_per_s")})
        + chart(
            "Data wait",
            f"of the time; starved above {STARVED:.0%}",
            {"waiting": points("data_wait_fraction")},
            "%",
            top=STARVED,
        )
    )
    return (
        f'<p>Over the steps. Touch a curve to read its values.</p><div class="charts">{charts}</div>'
        if charts
        else ""
    )


def _tables(groups: dict[str, dict[str, Any]]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(text, value))
        return (
            "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        )

    tables = [
        f"<table>{f'<caption>{escape(group)}</caption>' if group else ''}"
        + "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text(value))}</td></tr>"
            for name, value in values.items()
        )
        + "</table>"
        for group, values in groups.items()
        if values
    ]
    return f'<div class="tables">{"".join(tables)}</div>' if tables else ""


_SCRIPT = """
addEventListener("pointerover", ({target}) => {
  const read = target.querySelector(":scope > title"), output = target.closest("figure")?.querySelector("output");
  if (read && output) output.textContent = read.textContent;
});
"""

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f4; --card: #fff; --ink: #1d2024; --faint: #666b73; --line: #e3e3df;
  --s0: #2a6fbf; --s1: #c4562a; --s2: #2f8a5f; --good: #23784e; --warn: #9a5b00; --bad: #bb2d24; }
@media (prefers-color-scheme: dark) { :root { --ground: #141619; --card: #1d2024; --ink: #e6e6e3; --faint: #9ba1a9;
  --line: #33373d; --s0: #6da9ee; --s1: #ec9066; --s2: #66c295; --good: #66c295; --warn: #e3ad4c; --bad: #f0776c; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { max-width: 1240px; margin: auto; padding: 28px 16px 48px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.3; } h2 { font-size: 18px; margin: 36px 0 8px; }
.faint, figcaption, dt, output, .keys, th { color: var(--faint); font-size: 13px; } figcaption b { color: var(--ink); }
.progress { height: 4px; margin: 10px 0 6px; border-radius: 2px; background: var(--line); }
.progress i { display: block; height: 4px; border-radius: 2px; background: var(--s0); }
.verdict, dl div, .charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.verdict { margin: 20px 0 12px; padding: 14px 20px; } .verdict h2 { margin: 0 0 6px; }
.verdict li { display: flex; gap: 10px; padding: 2px 0; } .verdict p { color: var(--ink); }
.verdict i { flex: 0 0 14px; font: bold 15px/1.5 system-ui; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
section > p { margin-bottom: 10px; }
dl { display: grid; gap: 8px; grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); }
dl div { padding: 8px 12px; } dd { font-size: 20px; line-height: 1.3; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.charts figure { display: flex; flex-direction: column; padding: 12px 14px 8px; } output { min-height: 39px; }
svg { width: 100%; margin-top: auto; } line { stroke: var(--line); } text, rect { fill: var(--faint); font-size: 11px; }
.y { text-anchor: end; } .x { text-anchor: middle; } rect { opacity: 0; } rect:hover { opacity: .2; }
path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; } .s0 { stroke: var(--s0); }
.s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .keys span { margin-right: 14px; }
.keys span::before { content: ""; display: inline-block; width: 14px; margin-right: 5px; vertical-align: middle;
  border-top: 3px solid var(--s0); } .keys .s1::before { border-color: var(--s1); }
.keys .s2::before { border-color: var(--s2); }
.matrices { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.matrix { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); background: var(--card); }
p.scale { margin: 10px 0 0; display: flex; gap: 8px; align-items: center; } .scale i { flex: 0 1 240px; height: 10px;
  border: 1px solid var(--line); background: linear-gradient(90deg, #d04838, #d0483800 50%, #2a78d600 50%, #2a78d6); }
.views { max-width: 100%; border-radius: 4px; } .tables { columns: 380px; column-gap: 32px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-bottom: 14px; }
table:has(caption), tr { break-inside: avoid; } caption { text-align: left; font-weight: bold; }
th { width: 38%; text-align: left; font-weight: normal; }
th, td { border-top: 1px solid var(--line); padding: 3px 12px 3px 0; vertical-align: top; }
"""


if __name__ == "__main__":
    main()
