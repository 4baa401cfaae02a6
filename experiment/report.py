"""The page about a run, `report.html`: its health, its curves, its images and its configuration.

`python -m experiment.report RUN` writes it, while the run trains or afterwards, from the files that
are in the folder by then. The page is a single file that loads nothing else: `report.css` and
`report.js` are copied into it. `health.py` has the findings, and `charts.py` draws the curves.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from .atomic_write import write_text
from .charts import draw_chart
from .config import Pretrain
from .console import Console
from .entry_point import run_command
from .health import STARVED, Finding, Severity, assess_health
from .number_format import format_number
from .run_record import RunRecord, read_run

_STYLE = Path(__file__).with_name("report.css")
_SCRIPT = Path(__file__).with_name("report.js")

_SYMBOLS = {Severity.BAD: "✕", Severity.WARN: "!", Severity.GOOD: "✓", Severity.NOTE: "·"}
_HEADLINES = {
    Severity.BAD: "Something is wrong",
    Severity.WARN: "Needs attention",
    Severity.GOOD: "Healthy",
    Severity.NOTE: "Nothing to report yet",
}
_POSITIVE, _NEGATIVE = (42, 120, 214), (208, 72, 56)  # RGB: blue and red, as in report.css
_MOST_MATRICES = 6
_VIEWS_SIZE = (1600, 1600)  # pixels that the picture of the views has at most


class Tile(NamedTuple):
    """A metric that the page shows the last value of."""

    title: str
    metric: str
    factor: float = 1.0
    unit: str = ""


_TILES = [
    Tile("epoch", "epoch"),
    Tile("loss", "loss"),
    Tile("diagonal of C", "diagonal_mean"),
    Tile("off-diagonal of C, RMS", "off_diagonal_rms"),
    Tile("effective rank", "effective_rank"),
    Tile("kNN top-1", "knn_top1", 0.01, "%"),
    Tile("linear probe top-1", "probe_top1", 0.01, "%"),
    Tile("images/s", "images_per_s"),
    Tile("waiting for data", "data_wait_fraction", 1.0, "%"),
]


def main(console: Console) -> int:
    """Write the report of the run that is named on the command line; returns the exit status."""
    path = tyro.cli(
        write_report,
        prog="python -m experiment.report",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    console.print(str(path))
    return 0


def write_report(run: Annotated[Path, tyro.conf.arg(metavar="RUN")]) -> Path:
    """Write RUN/report.html, a report about the run, and print its path.

    Raises:
        ValueError: `run` is not the folder of a run.
    """
    path = run / "report.html"
    write_text(path, _page(read_run(run)))
    return path


# ── page ──────────────────────────────────────────────────────────────────────────────────────────


def _page(run: RunRecord) -> str:
    name = escape(run.folder.resolve().name)
    findings = assess_health(run)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{name}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>\n{_STYLE.read_text()}</style></head><body>",
        _header(run, name),
        _health(findings),
        f"<dl>{_tiles(run)}</dl>",
        _section("Curves", _curves(run)),
        _section("Cross-correlation", _matrices(run)),
        _section("Views", _views(run)),
        _section("Configuration", _tables(_grouped_settings(run))),
        _section("Environment", _tables({"": run.environment})),
        f"<script>\n{_SCRIPT.read_text()}</script></body></html>\n",
    ]
    return "".join(parts)


def _header(run: RunRecord, name: str) -> str:
    preset = escape(str(run.config.get("preset", "run")))
    status = run.status()
    written = datetime.now(UTC)
    return (
        f"<header><h1>{name}</h1>"
        f"<p>{preset} · <b>{status.name}</b> {status.progress}</p>"
        f'<div class="progress"><i style="width:{_fraction_done(run):.1%}"></i></div>'
        f'<p class="faint">Written {written:%Y-%m-%d %H:%M} UTC</p></header>'
    )


def _fraction_done(run: RunRecord) -> float:
    if run.summary:
        return 1.0
    if not run.total_steps:
        return 0.0
    return min(1.0, run.steps_done / run.total_steps)


def _health(findings: list[Finding]) -> str:
    worst = findings[0].severity
    items = [
        f'<li class="{severity}"><i>{_SYMBOLS[severity]}</i>'
        f"<p><b>{escape(title)}.</b> {escape(text)}</p></li>"
        for severity, title, text in findings
    ]
    return (
        f'<section class="findings"><h2 class="{worst}">{_HEADLINES[worst]}</h2>'
        f"<ul>{''.join(items)}</ul></section>"
    )


def _tiles(run: RunRecord) -> str:
    html = ""
    for title, metric, factor, unit in _TILES:
        values = run.values(metric)
        if values:
            last = format_number(factor * values[-1], unit)
            html += f"<div><dt>{title}</dt><dd>{last}</dd></div>"
    return html


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content or 'Nothing yet.'}</section>"


# ── curves ────────────────────────────────────────────────────────────────────────────────────────


def _curves(run: RunRecord) -> str:
    charts = "".join([*_learning_charts(run), *_feature_charts(run), *_speed_charts(run)])
    if not charts:
        return ""
    help_text = "x axis: step. Point at a curve to read its values."
    return f'<p>{help_text}</p><div class="charts">{charts}</div>'


def _learning_charts(run: RunRecord) -> Iterator[str]:
    loss_scale = run.setting("loss_scale") or 1.0
    lambd = run.setting("lambd") or 0.0
    yield draw_chart(
        "Loss",
        "and its two terms",
        {
            "loss": run.points("loss"),
            "invariance": run.points("invariance", loss_scale),
            "λ · redundancy": run.points("redundancy", loss_scale * lambd),
        },
        log=True,
    )
    yield draw_chart(
        "Cross-correlation",
        "goal: diagonal 1, off-diagonal 0",
        {
            "diagonal, mean": run.points("diagonal_mean"),
            "off-diagonal, RMS": run.points("off_diagonal_rms"),
        },
        reach=1,
    )
    yield draw_chart(
        "Accuracy",
        "top-1 on held-out images",
        {"kNN": run.points("knn_top1", 0.01), "linear probe": run.points("probe_top1", 0.01)},
        unit="%",
    )


def _feature_charts(run: RunRecord) -> Iterator[str]:
    yield draw_chart(
        "Effective rank",
        "of the features; 1 is collapse",
        {"rank": run.points("effective_rank")},
    )
    yield draw_chart(
        "Feature deviation",
        "between images; 0 is collapse",
        {"deviation": run.points("feature_deviation")},
    )


def _speed_charts(run: RunRecord) -> Iterator[str]:
    yield draw_chart(
        "Learning rate",
        "",
        {"weights": run.points("lr"), "biases and batch norm": run.points("lr_biases")},
        log=True,
    )
    yield draw_chart("Speed", "of training", {"images/s": run.points("images_per_s")})
    yield draw_chart(
        "Waiting for data",
        f"fraction of time spent waiting; above {STARVED:.0%} is too much",
        {"waiting": run.points("data_wait_fraction")},
        unit="%",
        reach=STARVED,
    )


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────


def _matrices(run: RunRecord) -> str:
    """Corners of the cross-correlation matrix at up to six steps."""
    files = sorted(path for path in run.folder.glob("correlation/*.npy") if path.stem.isdecimal())
    shown = np.linspace(0, len(files) - 1, min(_MOST_MATRICES, len(files)))
    figures = ""
    for position in shown:
        path = files[round(position)]
        with suppress(OSError, ValueError, EOFError):  # the file is incomplete
            step = f"step {int(path.stem):,}"
            image = _picture(_colour_matrix(np.load(path)), "matrix", f"matrix at {step}")
            figures += f"<figure>{image}<figcaption>{step}</figcaption></figure>"
    if not figures:
        return ""
    explanation = (
        "A corner of C, the correlation of each dimension of view a (rows) with each dimension of "
        "view b (columns). The goal is the identity matrix: a blue diagonal and nothing else."
    )
    return (
        f'<p>{explanation}</p><div class="matrices">{figures}</div>'
        '<p class="scale">-1 <i></i> 1</p>'
    )


def _colour_matrix(matrix: NDArray[Any]) -> Image.Image:
    """A picture of values from -1 to 1: blue above 0, red below, transparent at 0."""
    values = np.nan_to_num(matrix.astype(np.float32)).clip(-1, 1)[..., None]  # [D, D, 1]
    colours = np.where(values > 0, _POSITIVE, _NEGATIVE)  # [D, D, 3]
    opacity = np.rint(255 * abs(values))
    return Image.fromarray(np.concatenate([colours, opacity], axis=2).astype(np.uint8))


def _views(run: RunRecord) -> str:
    try:
        image = Image.open(run.folder / "views.png").convert("RGB")
    except OSError:  # the run has not written it, or not completely
        return ""
    image.thumbnail(_VIEWS_SIZE)
    explanation = (
        "From top to bottom: an image, its view a, its view b. "
        "The views should be hard to match, but still show the same thing."
    )
    return f"<p>{explanation}</p>{_picture(image, 'views', 'images and their views')}"


def _picture(image: Image.Image, css_class: str, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG" if image.mode == "RGBA" else "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{css_class}" alt="{alt}" src="data:image;base64,{data}">'


# ── tables ────────────────────────────────────────────────────────────────────────────────────────


def _grouped_settings(run: RunRecord) -> dict[str, dict[str, Any]]:
    """The configuration by the groups of the command line; everything else is under "run"."""
    group_of = {
        setting.name: group for group, part in vars(Pretrain()).items() for setting in fields(part)
    }
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in run.config.items():
        group = group_of.get(name, "run")
        groups.setdefault(group, {})[name] = value
    return groups


def _tables(groups: dict[str, dict[str, Any]]) -> str:
    """A table of names and values for each group that has any."""
    tables = [_table(caption, values) for caption, values in groups.items() if values]
    return f'<div class="tables">{"".join(tables)}</div>' if tables else ""


def _table(caption: str, values: dict[str, Any]) -> str:
    html = f"<caption>{escape(caption)}</caption>" if caption else ""
    for name, value in values.items():
        html += f"<tr><th>{escape(name)}</th><td>{escape(_format_setting(value))}</td></tr>"
    return f"<table>{html}</table>"


def _format_setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_format_setting(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(run_command(main))
