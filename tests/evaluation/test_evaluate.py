"""The commands of evaluate.py that measure and export: their results, files and messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model
from tests.helpers.runs import CPU, Command, assert_refused, outputs, result_of


def test_knn(evaluate: Command, common: list[Any]) -> None:
    status, text = evaluate("knn", *common, "--k", "5")
    assert status == 0, text
    record = result_of("knn")
    results = record["results"]
    assert list(results) == ["knn_top1", "knn_top5", "effective_rank", "alignment", "uniformity"]
    assert 50 < results["knn_top1"] <= 100  # random weights distinguish colours
    assert results["knn_top1"] <= results["knn_top5"] <= 100
    assert 1 <= results["effective_rank"] <= 64
    assert record["setup"] == {
        "backbone": "resnet18 of width 8",
        "pretraining epochs": 1,
        "view, px": 16,
        "training images": 60,
        "classes": 3,
        "k": 5,
        "temperature": 0.07,
    }
    assert "training images: 60 (published: 1,281,167)" in record["differs"]
    assert record["images"]["train"].keys() == {"images", "classes", "fingerprint"}
    assert record["images"]["train"]["images"] == 60
    assert record["images"]["train"]["classes"] == 3
    assert record["configuration"]["k"] == 5
    assert record["environment"]["torch"] == torch.__version__.partition("+")[0]
    for words in (
        "published (lightly, 100 epochs)",
        "classes: 3 (published: 1,000)",
        "out/knn.json",
    ):
        assert words in " ".join(text.split())


def test_linear_trains_a_classifier_for_predict(
    evaluate: Command, common: list[Any], labelled: Path
) -> None:
    status, text = evaluate("linear", *common, "--epochs", "6", "--batch-size", "20", "--lr", "3")
    assert status == 0, text
    record = result_of("linear-imagenet")
    assert record["results"]["top1"] >= 70
    assert {
        "epochs: 6 (published: 100)",
        "batch: 20 (published: 256)",
        "lr: 3 (published: 0.3)",
    } <= set(record["differs"])
    assert not [line for line in record["differs"] if line.startswith("weight decay")]
    assert record["published"]["results"] == {"top1": 73.2, "top5": 91.0}
    assert outputs() == {"linear-imagenet.json", "linear-imagenet.safetensors"}

    images = sorted((labelled / "val").rglob("*.jpg"))
    checkpoint = ["--checkpoint", "out/linear-imagenet.safetensors"]
    status, text = evaluate("predict", *checkpoint, "--json", *images, *CPU)
    assert status == 0, text
    predictions = json.loads(text)
    assert [prediction["image"] for prediction in predictions] == [str(path) for path in images]
    is_correct = [
        prediction["pred_class"] == path.parent.name
        for prediction, path in zip(predictions, images, strict=True)
    ]
    # The same test views give the same accuracy.
    assert 100 * np.mean(is_correct) == pytest.approx(record["results"]["top1"])
    for prediction in predictions:
        assert prediction["pred_class"] == f"class{prediction['pred_label']}"
        assert 1 / 3 <= prediction["pred_score"] <= 1


def test_a_sweep_trains_each_classifier_as_if_it_were_alone(
    evaluate: Command, common: list[Any]
) -> None:
    options = ["linear", *common, "--epochs", "2", "--batch-size", "20"]
    status, text = evaluate(*options, "--lr", "0.3", "3", "--weight-decay", "0", "1e-3")
    assert status == 0, text
    sweep = result_of("linear-imagenet-sweep")
    heads = sweep["heads"]
    pairs = [(head["lr"], head["weight decay"]) for head in heads]
    assert pairs == [(0.3, 0), (0.3, 1e-3), (3, 0), (3, 1e-3)]
    assert sweep["results"]["top1"] == max(head["top1"] for head in heads)
    assert "classifiers tried: 4 (published: 1)" in sweep["differs"]

    status, text = evaluate(*options, "--lr", "3", "--weight-decay", "1e-3")
    assert status == 0, text
    alone = result_of("linear-imagenet")["heads"][0]
    assert alone == {name: pytest.approx(value, rel=1e-4) for name, value in heads[3].items()}


def test_resumed_linear_training_writes_the_same_classifier(
    evaluate: Command, common: list[Any]
) -> None:
    options = ["linear", *common, "--epochs", "4", "--batch-size", "20"]
    assert evaluate(*options)[0] == 0
    uninterrupted = Path("out/linear-imagenet.safetensors").read_bytes()
    Path("out/linear-imagenet.safetensors").unlink()

    save_checkpoint = model.save_checkpoint

    def save_and_interrupt(path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "save_checkpoint", save_and_interrupt)
        assert evaluate(*options)[0] == 130
    assert outputs() == {"linear-imagenet.json", "linear-imagenet.unfinished.pt"}

    status, text = evaluate(*options, "--resume")
    assert status == 0, text
    assert Path("out/linear-imagenet.safetensors").read_bytes() == uninterrupted
    assert outputs() == {"linear-imagenet.json", "linear-imagenet.safetensors"}


def test_resume_needs_an_interrupted_training(evaluate: Command, common: list[Any]) -> None:
    options = ["linear", *common, "--epochs", "1", "--batch-size", "20"]
    assert evaluate(*options)[0] == 0
    assert_refused(evaluate(*options, "--resume"), "--resume", "nothing to resume from")
    assert_refused(
        evaluate(*options, "--output", "new", "--resume"), "--resume", "nothing to resume from"
    )
    assert not Path("new").exists()


@pytest.mark.parametrize(("preset", "backbone_lr"), [("paper", 0.002), ("authors", 0.005)])
def test_semisup_fine_tunes_the_network(
    evaluate: Command, common: list[Any], pretrained: Path, preset: str, backbone_lr: float
) -> None:
    options = ["--labels", "0.1", "--preset", preset, "--epochs", "3", "--batch-size", "3"]
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    record = result_of("semisup-10percent")
    assert record["setup"]["labelled images"] == 6
    assert record["images"]["labelled"]["images"] == 6
    assert record["setup"]["backbone lr"] == backbone_lr
    # The published results are the paper's.
    assert record["published"]["results"] == {"top1": 69.7, "top5": 89.3}
    difference = "backbone lr: 0.005 (published: 0.002)"
    assert (difference in record["differs"]) == (preset == "authors")

    from safetensors.torch import load_file

    tuned = load_file("out/semisup-10percent.safetensors")
    before = torch.load(pretrained / "backbone.pth", weights_only=True)
    assert not torch.equal(tuned["conv1.weight"], before["conv1.weight"])
    # Batch norm is in training mode.
    assert not torch.equal(tuned["bn1.running_mean"], before["bn1.running_mean"])


def test_semisup_reads_simclrs_lists_of_labelled_images(
    evaluate: Command, common: list[Any]
) -> None:
    options = ["--labels", "list.txt", "--epochs", "1", "--batch-size", "6"]
    names = [f"train_{i:03d}.jpg" for i in (0, 1, 2, 9, 10, 11)]
    Path("list.txt").write_text("\n".join(names))
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    assert result_of("semisup-10percent")["images"]["labelled"]["images"] == 6

    Path("list.txt").write_text("train_000.jpg\nn01440764_123.JPEG\n")
    assert_refused(evaluate("semisup", *common, *options), "n01440764_123.JPEG", "list.txt")


@pytest.fixture(scope="module")
def devkit(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC2007 development kit of sixty images, with one of three classes in each."""
    parent = tmp_path_factory.mktemp("kit")
    root = parent / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    ids: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, path in enumerate(sorted((labelled / "train").rglob("*.jpg"))):
        id = f"{number:06d}"
        ids["trainval" if number % 2 else "test"].append(id)
        shutil.copy(path, root / "JPEGImages" / f"{id}.jpg")
        annotation = (
            f"<annotation><object><name>{path.parent.name}</name>"
            f"<difficult>{int(number % 10 == 0)}</difficult>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            "</object></annotation>"
        )
        (root / "Annotations" / f"{id}.xml").write_text(annotation)
    for split, split_ids in ids.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(split_ids) + "\n")
    return parent


def test_svm_on_a_development_kit(evaluate: Command, pretrained: Path, devkit: Path) -> None:
    options = ["--checkpoint", pretrained, "--output", "out", *CPU]
    status, text = evaluate("svm", *options, "--voc07", devkit)
    assert status == 0, text
    record = result_of("svm")
    precisions = [figures["average_precision"] for figures in record["each"].values()]
    assert len(precisions) == 3
    assert 0 < record["results"]["map"] <= 100
    assert record["results"]["map"] == pytest.approx(np.mean(precisions))
    assert record["published"]["results"] == {"map": 86.2}


@pytest.mark.parametrize(
    "layout", ["torchvision", "timm", "mmpretrain", "solo-learn", "lightly", "safetensors"]
)
def test_exported_weights_give_the_same_results(
    evaluate: Command, pretrained: Path, labelled: Path, layout: str
) -> None:
    output = ["--output", "out", *CPU]
    status, text = evaluate("export", "--checkpoint", pretrained, "--to", layout, *output)
    assert status == 0, text
    (name,) = outputs()
    assert f"out/{name}" in text

    options = ["--train", labelled, "--size", "16", *output]
    results = []
    for checkpoint in (pretrained, f"out/{name}"):
        assert evaluate("knn", "--checkpoint", checkpoint, *options)[0] == 0
        results.append(result_of("knn")["results"])
    assert results[0] == results[1]


def test_other_weights_in_the_folder_of_a_run_have_results_of_their_own(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    run = Path(shutil.copytree(pretrained, "run"))
    options = ["--train", labelled, *CPU]
    assert evaluate("knn", "--checkpoint", run, *options)[0] == 0
    before = (run / "knn.json").read_bytes()

    shutil.copy(run / "backbone.safetensors", run / "tuned.safetensors")
    tuned = ["--checkpoint", run / "tuned.safetensors"]
    assert evaluate("knn", *tuned, *options, "--k", "3")[0] == 0
    assert (run / "knn.json").read_bytes() == before
    assert json.loads((run / "tuned" / "knn.json").read_text())["setup"]["k"] == 3

    exported = ["--checkpoint", run / "backbone.safetensors"]
    assert evaluate("knn", *exported, *options, "--k", "3")[0] == 0
    assert (run / "knn.json").read_bytes() != before
