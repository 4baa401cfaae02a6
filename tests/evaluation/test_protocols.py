"""The published protocols, and how a set-up is compared with the published one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation import command_options, protocols
from evaluation.results import differences

ROOT = Path(__file__).parents[2]


def linear_command(*arguments: str) -> command_options.LinearCommand:
    command = command_options.parse(["linear", *arguments])
    assert isinstance(command, command_options.LinearCommand)
    return command


# Epochs, learning rate, weight decay, milestones and published top-1, typed a second time.
@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("imagenet", (100, 0.3, 1e-6, (), 73.2)),
        ("mmpretrain", (100, 0.3, 1e-6, (), 71.8)),
        ("places205", (14, 0.01, 5e-4, (5, 9), 54.1)),
        ("inat18", (84, 0.01, 5e-4, (28, 56), 46.5)),
        ("demo", (10, 0.3, 1e-6, (), 73.2)),
    ],
)
def test_linear_protocols(preset: str, expected: tuple[object, ...]) -> None:
    command = linear_command("--train", "x", "--preset", preset)
    protocol = command.protocol
    assert (
        protocol.epochs,
        protocol.lr,
        protocol.weight_decay,
        protocol.milestones,
        command.published().results["top1"],
    ) == expected


def test_every_linear_protocol_is_tested() -> None:
    assert list(protocols.LINEAR) == ["imagenet", "mmpretrain", "places205", "inat18", "demo"]


def test_transfer_learning_rates_scale_with_the_batch_size() -> None:
    command = linear_command("--preset", "places205", "--batch-size", "512")
    assert command.heads() == [(0.02, 5e-4)]


def test_a_sweep_has_twelve_heads() -> None:
    heads = linear_command("--sweep").heads()
    assert len(set(heads)) == 12
    assert {decay for _, decay in heads} == {0.0, 1e-6, 1e-4}


def test_semisupervised_protocols() -> None:
    """Backbone learning rate, milestones, epochs, learning rate and batch size."""
    assert protocols.SEMISUP["paper"] == (0.002, (12, 16), 20, 0.5, 256)
    assert protocols.SEMISUP["authors"] == (0.005, (), 20, 0.5, 256)


@pytest.mark.parametrize("name", ["imagenet", "mmpretrain", "places205", "inat18"])
def test_the_published_command_differs_in_nothing_from_the_published_set_up(name: str) -> None:
    command = linear_command("--train", "x", "--preset", name)
    published = command.published()
    ((lr, decay),) = command.heads()
    setup = {
        "backbone": "resnet50",
        "pretraining epochs": 300 if name == "mmpretrain" else 1000,
        "view, px": 224,
        "training images": published.setup["training images"],
        "classes": published.setup["classes"],
        "batch": command.batch_size,
        "precision": command.precision,
        **command.protocol.setup,
        "lr": lr,
        "weight decay": decay,
        "classifiers tried": 1,
    }
    assert differences(setup, published) == []
    assert differences(setup | {"batch": 512}, published) == ["batch: 512 (published: 256)"]


def test_the_documentation_shows_the_measured_results() -> None:
    """The fourth cell of each row is the value in the JSON file of its evaluation."""
    lines = (ROOT / "docs" / "evaluation.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
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
    folder = ROOT / "bench" / "results" / "evaluate-demo"
    for name, (cell, figures) in shown.items():
        record = json.loads((folder / f"{name}.json").read_text())
        assert cell == " / ".join(f"{record['results'][figure]:.1f}" for figure in figures), name
        assert "-dirty" not in record["environment"]["commit"], name
