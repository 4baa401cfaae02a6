"""Results of evaluations: a JSON file each, and a table that shows the published results beside.

`comparison.py` reads the files of several runs and prints one table of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .command_options import Command
from .protocols import Published
from .sibling_packages import experiment

if TYPE_CHECKING:
    from pipeline import Store

    from .evaluated_network import EvaluatedNetwork

Record = dict[str, Any]
"""The content of a result's JSON file; `save_result` has its keys."""


@dataclass(frozen=True)
class EvaluationResult:
    """The outcome of one evaluation."""

    name: str
    """Name of the evaluation and of its JSON file."""
    figures: dict[str, float]
    """The measured values by name."""
    setup: dict[str, Any]
    """What the figures depend on, besides the network; keys as in `Published.setup`."""
    published: Published | None
    stores: dict[str, Store]
    """The images that were used."""
    details: dict[str, Any] = field(default_factory=dict)
    """Figures of the parts, if there are parts: of each class, or of each classifier of a sweep."""


def save_result(result: EvaluationResult, command: Command, network: EvaluatedNetwork) -> None:
    """Print a result, and write it to `NAME.json` in the folder for results."""
    setup = network.setup | result.setup
    published = result.published
    record: Record = {
        "evaluation": result.name,
        "results": result.figures,
        "published": None if published is None else published._asdict(),
        "setup": setup,
        "differs": differences(setup, published),
        **result.details,
        "weights": network.describe_weights(),
        "images": {name: _describe_store(store) for name, store in result.stores.items()},
        "configuration": asdict(command),
        "environment": experiment.environment([network.device_name]),
    }
    path = network.folder / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment.write_json(path, record)

    console = network.console
    console.rich.print(results_table([(result.name, record)]))
    if published is not None and record["differs"]:
        console.print(
            f"The settings differ from the published ones ({published.source}): "
            f"{'; '.join(record['differs'])}"
        )
    console.print(f"written to {experiment.printable(str(path))}")


def differences(setup: dict[str, Any], published: Published | None) -> list[str]:
    """Each difference from the published set-up, in a few words."""
    if published is None:
        return []
    return [
        f"{name}: {_format_value(setup.get(name))} (published: {_format_value(value)})"
        for name, value in published.setup.items()
        if setup.get(name) != value
    ]


def results_table(records: Sequence[tuple[str, Record]]) -> Table:
    """A table with a row for each figure, and a column for each run and for published results.

    Args:
        records: The heading of a column, and a result to show in it.
    """
    columns = list(dict.fromkeys(column for column, _ in records))
    sources = {record["published"]["source"] for _, record in records if record["published"]}
    is_single = len(records) == 1

    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("" if is_single else "evaluation", overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    published_heading = "published"
    if len(sources) == 1:
        published_heading = f"published ({next(iter(sources))})"
    table.add_column(published_heading, overflow="fold")

    measured: dict[tuple[str, str], dict[str, str]] = {}  # by evaluation and figure, then by column
    published: dict[tuple[str, str], str] = {}
    for column, record in records:
        for figure, value in record["results"].items():
            row = (record["evaluation"], figure)
            measured.setdefault(row, {})[column] = _format_value(value)
            if record["published"] and figure in record["published"]["results"]:
                published[row] = _format_published(
                    record["published"], figure, with_source=len(sources) > 1
                )

    for row, cells in measured.items():
        evaluation, figure = row
        heading = figure if is_single else f"{evaluation}: {figure}"
        table.add_row(
            heading, *(cells.get(column, "-") for column in columns), published.get(row, "-")
        )
    return table


def _describe_store(store: Store) -> dict[str, Any]:
    from .sibling_packages import pipeline

    return {
        "images": len(store),
        "classes": len(store.classes),
        "fingerprint": pipeline.fingerprint(store),
    }


def _format_published(published: dict[str, Any], figure: str, *, with_source: bool) -> str:
    value = f"{published['results'][figure]:.1f}"
    return f"{value} ({published['source']})" if with_source else value


def _format_value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
