"""Tables that commands print besides the one of `results.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from .sibling_packages import experiment

if TYPE_CHECKING:
    from .svm import SvmResult


def print_sweep(details: Sequence[dict[str, float]], console: experiment.Console) -> None:
    """Print the accuracy of each classifier of a sweep: top-1 / top-5."""
    rows = {}
    for head in details:
        name = f"lr {head['lr']:g}, weight decay {head['weight decay']:g}"
        rows[name] = f"{head['top1']:.2f} / {head['top5']:.2f}"
    console.table(rows)
    console.print(
        "The best classifier was chosen on the test set, so its accuracy is slightly optimistic."
    )


def print_svms(svms: SvmResult, classes: Sequence[str], console: experiment.Console) -> None:
    """Print the average precision and the C of each class."""
    rows = {}
    for name, precision, cost in zip(classes, svms.average_precisions, svms.costs, strict=True):
        rows[name] = f"{precision:.2f} (C {cost:g})"
    console.table(rows)
    if svms.not_converged:
        console.print(
            f"{svms.not_converged} of {svms.fits} fits had not converged after 2,000 iterations"
        )


def print_predictions(
    images: Sequence[Path], predictions: Sequence[dict[str, Any]], console: experiment.Console
) -> None:
    """Print a row for each image, and one for each of its neighbours if there are any."""
    image_column = Column("image", overflow="fold")
    table = Table(image_column, "class", "score", box=None, pad_edge=False, header_style="")
    for path, prediction in zip(images, predictions, strict=True):
        table.add_row(
            Text(experiment.printable(str(path))),
            Text(prediction["pred_class"]),
            f"{prediction['pred_score']:.3f}",
        )
        for neighbour in prediction.get("neighbours", ()):
            table.add_row(
                Text(f"  neighbour {experiment.printable(neighbour['image'])}"),
                Text(neighbour["pred_class"] or ""),
                f"{neighbour['similarity']:.3f}",
            )
    console.rich.print(table)
