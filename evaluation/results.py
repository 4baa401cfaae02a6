"""What an evaluation leaves: a table beside what is published, where the set-up differs, and a JSON with all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .protocols import Job, Published
from .rooms import experiment

if TYPE_CHECKING:
    from pipeline import Store

    from .evaluated_network import EvaluatedNetwork

_PRETRAINED = "pretraining's end"


def record(
    subject: EvaluatedNetwork,
    name: str,
    job: Job,
    results: dict[str, float],
    setup: dict[str, Any],
    published: Published | None,
    stores: dict[str, Store],
    **details: Any,
) -> None:
    """Prints and writes one evaluation: `name`.json in the subject's folder.

    results: figures by their names. setup: what decides about them, in the words of `Published`, besides the subject's.
    details: figures of each part, where there are parts.
    """
    setup = subject.setup | setup
    found = {
        "evaluation": name,
        "results": results,
        "published": published and published._asdict(),
        "setup": setup,
        "differs": differences(setup, published),
        **details,
        **subject.about(stores),
        "configuration": asdict(job),
        "environment": experiment.environment([subject.device_name]),
    }
    path = subject.folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment.write_json(path, found)
    subject.console.rich.print(_table([(name, found)]))
    if published and found["differs"]:
        subject.console.print(
            f"Not the set-up of what is published ({published.source}): {'; '.join(found['differs'])}"
        )
    subject.console.print(f"written to {experiment.printable(str(path))}")


def differences(setup: dict[str, Any], published: Published | None) -> list[str]:
    """What is otherwise than in the published set-up, each in a few words."""
    wanted = published.setup if published else {}
    return [
        f"{name} {_said(setup.get(name))}, not {_said(value)}"
        for name, value in wanted.items()
        if setup.get(name) != value
    ]


def compare(runs: Sequence[Path], console: experiment.Console) -> int:
    """One table of all that lies in these folders; the exit status. ValueError for one without results."""
    runs = list({run.resolve(): run for run in runs}.values())
    names = [run.resolve().name for run in runs]
    called = [
        experiment.printable(str(run) if names.count(name) > 1 else name)
        for run, name in zip(runs, names, strict=True)
    ]
    found = [
        (name, result)
        for name, run in zip(called, runs, strict=True)
        for result in _read(run, console)
    ]
    console.rich.print(_table(found))
    for source in dict.fromkeys(
        result["published"]["source"] for _, result in found if result["published"]
    ):
        several = [
            f"{run}: {name}"
            for run, result in found
            if (result["published"] or {}).get("source") == source and result["differs"]
            for name in [result["evaluation"]]
        ]
        if several:
            console.print(
                f"Not the set-up of {source}: {', '.join(several)}; their JSON says in what"
            )
    return 0


def _read(run: Path, console: experiment.Console) -> list[dict[str, Any]]:
    """The evaluations in a folder, and the test that a pretraining ended with."""
    if not run.is_dir():
        raise ValueError(
            f"{run} is no folder: name folders with results of evaluate.py, like runs/demo"
        )
    found = []
    for path in sorted(run.glob("*.json")):
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                continue  # what predict said
            if {"evaluation", "results", "published", "differs"} <= values.keys():
                _table([("", values)])  # which looks at all of it
                found.append(values)
            elif path.name == "summary.json" and isinstance(values.get("knn_top1_trained"), float):
                results = {"knn_top1": values["knn_top1_trained"]}
                found.append(
                    {
                        "evaluation": _PRETRAINED,
                        "results": results,
                        "published": None,
                        "differs": [],
                    }
                )
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            console.print(f"left out {experiment.printable(str(path))}, it is damaged: {error}")
    if not found:
        raise ValueError(
            f"{run} holds no results: evaluate something first, like: evaluate.py knn --checkpoint {run}"
        )
    return found


def _table(found: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """A row for each figure, a column for each run, and what is published beside them."""
    runs = list(dict.fromkeys(run for run, _ in found))
    sources = sorted({result["published"]["source"] for _, result in found if result["published"]})
    one = len(found) == 1
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("" if one else "evaluation", overflow="fold")
    for run in runs:
        table.add_column(Text(run), justify="right", overflow="fold")
    table.add_column(
        f"published ({sources[0]})" if len(sources) == 1 else "published", overflow="fold"
    )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for run, result in found:
        published = result["published"] or {"results": {}, "source": ""}
        for name, value in result["results"].items():
            row = rows.setdefault((result["evaluation"], name), {})
            row[run] = _said(value)
            if name in published["results"]:
                source = f" ({published['source']})" * (len(sources) > 1)
                row["published"] = f"{published['results'][name]:.1f}{source}"
    for (evaluation, name), row in rows.items():
        cells = [row.get(run, "-") for run in runs]
        table.add_row(name if one else f"{evaluation}: {name}", *cells, row.get("published", "-"))
    return table


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "unknown" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
