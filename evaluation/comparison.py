"""The results of several runs in one table: `evaluate.py compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Record, results_table
from .sibling_packages import experiment

_RECORD_KEYS = {"evaluation", "results", "published", "differs"}
_AFTER_PRETRAINING = "after pretraining"  # the kNN test that train.py ends with


def compare(runs: Sequence[Path], console: experiment.Console) -> None:
    """Print one table of all results in these folders.

    ValueError if a folder does not exist or has no results.
    """
    unique_runs = list({run.resolve(): run for run in runs}.values())
    records = [
        (column, record)
        for column, run in zip(_column_names(unique_runs), unique_runs, strict=True)
        for record in _read_results(run, console)
    ]
    console.rich.print(results_table(records))

    differing: dict[str, list[str]] = {}  # evaluations in another set-up, by the published source
    for column, record in records:
        if record["published"] and record["differs"]:
            evaluations = differing.setdefault(record["published"]["source"], [])
            evaluations.append(f"{column}: {record['evaluation']}")
    for source, evaluations in differing.items():
        console.print(
            f"These results use other settings than {source}: {', '.join(evaluations)}. "
            'See "differs" in the JSON files.'
        )


def _column_names(runs: Sequence[Path]) -> list[str]:
    """The name of each folder, or its path if several folders have the same name."""
    names = [run.resolve().name for run in runs]
    return [
        experiment.printable(name if names.count(name) == 1 else str(run))
        for run, name in zip(runs, names, strict=True)
    ]


def _read_results(run: Path, console: experiment.Console) -> list[Record]:
    """The evaluations in a folder, and the kNN test that a pretraining ended with."""
    if not run.is_dir():
        raise ValueError(
            f"{run} is not a folder: name folders with results of evaluate.py, like runs/demo"
        )
    records = []
    for path in sorted(run.glob("*.json")):
        try:
            record = _read_record(path)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            console.print(f"left out {experiment.printable(str(path))}, it is damaged: {error}")
            continue
        if record is not None:
            records.append(record)
    if not records:
        raise ValueError(
            f"{run} holds no results: evaluate it first, for example with "
            f"evaluate.py knn --checkpoint {run}"
        )
    return records


def _read_record(path: Path) -> Record | None:
    """The result in a JSON file; None if it is a file of another kind, like those of `predict`."""
    values: Any = json.loads(path.read_text())
    if not isinstance(values, dict):
        return None
    if values.keys() >= _RECORD_KEYS:
        results_table([("", values)])  # raises if a value is damaged
        return values
    if path.name == "summary.json" and isinstance(values.get("knn_top1_trained"), float):
        return {
            "evaluation": _AFTER_PRETRAINING,
            "results": {"knn_top1": values["knn_top1_trained"]},
            "published": None,
            "differs": [],
        }
    return None
