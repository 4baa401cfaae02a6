"""Predictions: `evaluate.py predict`, and `load_classifier` in another program."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model
from evaluation import load_classifier
from tests.helpers.runs import CPU, Command, assert_refused

ROOT = Path(__file__).parents[2]


def test_predict_by_a_vote_with_neighbours(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    image = labelled / "train" / "class1" / "train_004.jpg"
    options = ["--checkpoint", pretrained, "--train", labelled, image, "--neighbours", *CPU]
    status, text = evaluate("predict", *options, "--json", "--k", "1")
    assert status == 0, text
    (prediction,) = json.loads(text)
    assert prediction["pred_class"] == "class1"
    assert prediction["pred_label"] == 1
    assert prediction["pred_score"] == 1.0
    neighbours = prediction["neighbours"]
    assert len(neighbours) == 5
    assert neighbours[0]["image"] == str(image), "the image is in the bank"
    assert neighbours[0]["pred_class"] == "class1"
    assert neighbours[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_predict_prints_a_table(
    evaluate: Command, pretrained: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # long paths would be folded
    image = labelled / "train" / "class1" / "train_004.jpg"
    options = ["--checkpoint", pretrained, "--train", labelled, image, "--neighbours", *CPU]
    status, text = evaluate("predict", *options)
    assert status == 0, text
    assert "Predicted by a vote of the 20 nearest of 60 training images" in text
    assert text.count("train_004.jpg") == 2, "the image and its nearest neighbour"


def test_predict_with_json_prints_nothing_else(
    pretrained: Path, labelled: Path, tmp_path: Path
) -> None:
    """Images of the bank that cannot be read are named on the standard error."""
    shutil.copytree(labelled / "train", tmp_path / "damaged")
    (tmp_path / "damaged" / "class0" / "bad.jpg").write_bytes(b"no image")
    image = labelled / "val" / "class2" / "val_002.jpg"
    options = ["--checkpoint", pretrained, "--train", tmp_path / "damaged", "--json", *CPU]
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "predict", *options, image],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(result.stdout)) == 1
    assert "bad.jpg" in result.stderr


def test_neighbours_need_a_bank_even_with_a_classifier(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    run = Path(shutil.copytree(pretrained, "run"))
    options = ["--train", labelled, "--epochs", "1", "--batch-size", "20", *CPU]
    assert evaluate("linear", "--checkpoint", run, *options)[0] == 0
    checkpoint = ["--checkpoint", run / "linear-imagenet.safetensors"]
    image = labelled / "val" / "class2" / "val_002.jpg"
    assert evaluate("predict", *checkpoint, image, *CPU)[0] == 0
    result = evaluate("predict", *checkpoint, image, "--neighbours", *CPU)
    assert_refused(result, "error: --neighbours needs --train")


def test_a_classifier_on_solo_learns_small_stem_keeps_its_padding(
    evaluate: Command, labelled: Path
) -> None:
    """solo-learn pads its small stem by 2 pixels, everybody else by 1.

    With another padding, `predict` would compute other features than `linear`.
    """
    backbone = model.build_backbone("resnet18", 8, small_stem=True)
    weights = model.Weights("solo-learn", backbone.state_dict(), {}, {}, [], 16)
    model.export(weights, "safetensors", Path("cifar.safetensors"))
    options = ["--epochs", "1", "--batch-size", "20", "--output", "out", *CPU]
    trained = ["--checkpoint", "cifar.safetensors", "--train", labelled]
    assert evaluate("linear", *trained, *options)[0] == 0
    path = Path("out/linear-imagenet.safetensors")
    assert model.load_backbone(model.read_weights(path), path).conv1.padding == (2, 2)


def test_load_classifier_accepts_paths_images_and_arrays(pretrained: Path, labelled: Path) -> None:
    classifier = load_classifier(pretrained, labelled, device="cpu")
    path = labelled / "val" / "class2" / "val_002.jpg"
    image = Image.open(path)
    prediction = classifier.predict(path)
    assert set(prediction) == {"pred_class", "pred_label", "pred_score"}
    assert classifier.predict(str(path)) == prediction
    assert classifier.predict(image) == prediction
    assert classifier.predict(np.asarray(image)) == prediction
    assert classifier.predict(image.convert("L"))["pred_class"] in {"class0", "class1", "class2"}

    batch = classifier.predict_batch([path, image])
    assert [result["pred_class"] for result in batch] == [prediction["pred_class"]] * 2
    assert classifier.predict_batch([]) == []


def test_load_classifier_refuses_other_arrays(pretrained: Path, labelled: Path) -> None:
    classifier = load_classifier(pretrained, labelled, device="cpu")
    with pytest.raises(ValueError, match="uint8"):
        classifier.predict(np.zeros((8, 8, 3), np.float32))  # type: ignore[arg-type]


def test_load_classifier_needs_a_classifier_or_a_bank(pretrained: Path) -> None:
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(pretrained, device="cpu")


def test_an_image_that_cannot_be_read_is_refused(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    good = labelled / "val" / "class0" / "val_000.jpg"
    Path("bad.jpg").write_bytes(good.read_bytes()[:200])
    Path("text.txt").write_text("no image")
    options = ["--checkpoint", pretrained, "--train", labelled, *CPU]
    for name in ("bad.jpg", "text.txt", "absent.jpg", "."):
        assert_refused(evaluate("predict", *options, good, name), name)


def test_missing_images_are_refused_before_the_bank_is_read(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    good = labelled / "val" / "class0" / "val_000.jpg"
    options = ["--checkpoint", pretrained, "--train", labelled, *CPU]
    result = evaluate("predict", *options, good, good.parent)
    assert_refused(result, "is not a file")
    assert "features of" not in result[1]


def test_predict_needs_images_and_labels(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    image = labelled / "val" / "class0" / "val_000.jpg"
    assert_refused(evaluate("predict", "--checkpoint", pretrained, *CPU), "IMAGE")
    assert_refused(
        evaluate("predict", "--checkpoint", pretrained, image, *CPU), "--train", "linear"
    )
