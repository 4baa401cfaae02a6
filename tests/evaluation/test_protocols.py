"""The published protocols and figures, and that ours are held against them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation import protocols

ROOT = Path(__file__).parents[2]


def test_the_published_protocols() -> None:
    """The table of the method, typed a second time."""
    jobs = {
        name: protocols.parse(["linear", "--train", "x", "--preset", name])
        for name in protocols.LINEAR
    }
    found = {
        name: (
            *job.protocol()[1][:3],
            job.protocol()[1].milestones,
            job.published().results["top1"],
        )  # type: ignore[union-attr]
        for name, job in jobs.items()
    }
    assert found == {
        "imagenet": (100, 0.3, 1e-6, (), 73.2),
        "mmpretrain": (100, 0.3, 1e-6, (), 71.8),
        "places205": (14, 0.01, 5e-4, (5, 9), 54.1),
        "inat18": (84, 0.01, 5e-4, (28, 56), 46.5),
        "demo": (10, 0.3, 1e-6, (), 73.2),
    }
    scaled = protocols.parse(["linear", "--preset", "places205", "--batch-size", "512"])
    assert scaled.heads() == [(0.02, 5e-4)]  # type: ignore[union-attr]
    assert protocols.SEMISUP["paper"] == (0.002, (12, 16), 20, 0.5, 256)
    assert protocols.SEMISUP["authors"] == (0.005, (), 20, 0.5, 256)


def test_the_readme_shows_what_was_measured() -> None:
    """Each row's fourth cell is what the JSON of its evaluation says."""
    rows = [
        line.split(" | ")
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    measured = {
        row[0].removeprefix("| ").partition(" (")[0]: row[3] for row in rows if len(row) == 5
    }
    shown = {
        "linear-demo": (measured["linear, ImageNet"], ("top1", "top5")),
        "semisup-1percent": (measured["1% of the labels"], ("top1", "top5")),
        "semisup-10percent": (measured["10% of the labels"], ("top1", "top5")),
        "linear-places205": (measured["Places-205"], ("top1",)),
        "linear-inat18": (measured["iNaturalist 2018"], ("top1",)),
        "svm": (measured["VOC07, mAP"], ("map",)),
        "knn": (measured["kNN"], ("knn_top1",)),
    }
    for name, (cell, figures) in shown.items():
        record = json.loads(
            (ROOT / "bench" / "results" / "evaluate-demo" / f"{name}.json").read_text()
        )
        assert cell == " / ".join(f"{record['results'][figure]:.1f}" for figure in figures), name
        assert "-dirty" not in record["environment"]["commit"], name


@pytest.mark.parametrize("name", ["imagenet", "mmpretrain", "places205", "inat18"])
def test_the_published_set_up_differs_in_nothing(name: str) -> None:
    """What `differs` says is true: nothing where the command is the published one."""
    from evaluation import results

    job = protocols.parse(["linear", "--train", "x", "--preset", name])
    assert isinstance(job, protocols.Linear)
    data = {
        key: value
        for key, value in job.published().setup.items()
        if key in ("training images", "classes")
    }
    epochs = 300 if name == "mmpretrain" else 1000
    network = {"backbone": "resnet50", "pretraining epochs": epochs, "view, px": 224}
    ((lr, decay),) = job.heads()
    setup = (
        network
        | data
        | {"batch": job.batch_size, "precision": job.precision}
        | job.protocol()[1].setup
    )
    setup["classifiers tried"] = len(job.heads())
    assert results.differences(setup | {"lr": lr, "weight decay": decay}, job.published()) == []
