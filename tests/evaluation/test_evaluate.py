"""The verb evaluate.py as a user meets it: what each evaluation finds, writes and says."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import protocols
from tests.helpers.runs import CPU, Train, outputs, refused, result_of

ROOT = Path(__file__).parents[2]


def test_knn(evaluate: Train, common: list[Any], pretrained: Path) -> None:
    status, text = evaluate("knn", *common, "--k", "5")
    assert status == 0, text
    values = result_of("knn")
    assert set(values["results"]) == {
        "knn_top1",
        "knn_top5",
        "effective_rank",
        "alignment",
        "uniformity",
    }
    assert 50 < values["results"]["knn_top1"] <= 100  # colours are told apart by random weights
    assert values["results"]["knn_top1"] <= values["results"]["knn_top5"] <= 100
    assert 1 <= values["results"]["effective_rank"] <= 64
    assert values["setup"] == {
        "backbone": "resnet18 of width 8",
        "pretraining epochs": 1,
        "view, px": 16,
        "training images": 60,
        "classes": 3,
        "k": 5,
        "temperature": 0.07,
    }
    assert "training images 60, not 1,281,167" in values["differs"]
    assert values["images"]["train"] == {"images": 60, "classes": 3} | {
        "fingerprint": values["images"]["train"]["fingerprint"]
    }
    assert values["configuration"]["k"] == 5
    assert values["environment"]["torch"] == torch.__version__.partition("+")[0]
    for said in ("published (lightly, 100 epochs)", "classes 3, not 1,000", "out/knn.json"):
        assert said in " ".join(text.split())


def test_linear_learns_and_leaves_a_classifier_for_predict(
    evaluate: Train, common: list[Any], labelled: Path
) -> None:
    status, text = evaluate("linear", *common, "--epochs", "6", "--batch-size", "20", "--lr", "3")
    assert status == 0, text
    values = result_of("linear-imagenet")
    assert values["results"]["top1"] >= 70
    assert {"epochs 6, not 100", "batch 20, not 256", "lr 3, not 0.3"} <= set(values["differs"])
    assert not [said for said in values["differs"] if said.startswith("weight decay")]
    assert values["published"]["results"] == {"top1": 73.2, "top5": 91.0}
    assert outputs() == {"linear-imagenet.json", "linear-imagenet.safetensors"}

    pictures = sorted((labelled / "val").rglob("*.jpg"))
    status, text = evaluate(
        "predict", "--checkpoint", "out/linear-imagenet.safetensors", "--json", *pictures, *CPU
    )
    assert status == 0, text
    predicted = json.loads(text)
    assert [p["image"] for p in predicted] == [str(path) for path in pictures]
    right = [
        p["pred_class"] == path.parent.name for p, path in zip(predicted, pictures, strict=True)
    ]
    assert 100 * np.mean(right) == pytest.approx(values["results"]["top1"])  # the same test views
    assert all(
        p["pred_class"] == f"class{p['pred_label']}" and 1 / 3 <= p["pred_score"] <= 1
        for p in predicted
    )


def test_a_sweep_trains_each_pair_as_if_it_were_alone(evaluate: Train, common: list[Any]) -> None:
    options = ["--epochs", "2", "--batch-size", "20"]
    status, text = evaluate(
        "linear", *common, *options, "--lr", "0.3", "3", "--weight-decay", "0", "1e-3"
    )
    assert status == 0, text
    heads = result_of("linear-imagenet-sweep")["heads"]
    assert [(h["lr"], h["weight decay"]) for h in heads] == [
        (0.3, 0),
        (0.3, 1e-3),
        (3, 0),
        (3, 1e-3),
    ]
    status, text = evaluate("linear", *common, *options, "--lr", "3", "--weight-decay", "1e-3")
    assert status == 0, text
    alone = result_of("linear-imagenet")["heads"][0]
    assert alone == {name: pytest.approx(value, rel=1e-4) for name, value in heads[3].items()}
    assert result_of("linear-imagenet-sweep")["results"]["top1"] == max(h["top1"] for h in heads)
    assert "classifiers tried 4, not 1" in result_of("linear-imagenet-sweep")["differs"]
    assert len(protocols.parse(["linear", "--sweep"]).heads()) == 12  # type: ignore[union-attr]


def test_an_interrupted_linear_goes_on_to_the_same_classifier(
    evaluate: Train, common: list[Any]
) -> None:
    options = ["linear", *common, "--epochs", "4", "--batch-size", "20"]
    assert evaluate(*options)[0] == 0
    whole = Path("out/linear-imagenet.safetensors").read_bytes()
    Path("out/linear-imagenet.safetensors").unlink()

    import evaluation.linear_heads

    saved = evaluation.heads.save_checkpoint

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.heads, "save_checkpoint", save_and_stop)
        assert evaluate(*options)[0] == 130
    assert "linear-imagenet.unfinished.pt" in outputs()
    status, text = evaluate(*options, "--resume")
    assert status == 0, text
    assert Path("out/linear-imagenet.safetensors").read_bytes() == whole
    refused(evaluate(*options, "--resume"), "--resume", "nothing")
    refused(evaluate(*options, "--output", "new", "--resume"), "--resume", "nothing")
    assert not Path("new").exists()


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_semisup_tunes_the_network(
    evaluate: Train, common: list[Any], pretrained: Path, preset: str
) -> None:
    options = ["--labels", "0.1", "--preset", preset, "--epochs", "3", "--batch-size", "3"]
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    values = result_of("semisup-10percent")
    assert values["setup"]["labelled images"] == 6
    assert values["images"]["labelled"]["images"] == 6
    assert values["setup"]["backbone lr"] == {"paper": 0.002, "authors": 0.005}[preset]
    assert values["published"]["results"] == {"top1": 69.7, "top5": 89.3}
    assert ("backbone lr 0.005, not 0.002" in values["differs"]) == (
        preset == "authors"
    )  # the figures are the paper's
    from safetensors.torch import load_file

    tuned = load_file("out/semisup-10percent.safetensors")
    before = torch.load(pretrained / "backbone.pth", weights_only=True)
    assert not torch.equal(tuned["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(
        tuned["bn1.running_mean"], before["bn1.running_mean"]
    )  # batch statistics are learned too


def test_semisup_takes_simclrs_lists(evaluate: Train, common: list[Any], labelled: Path) -> None:
    names = [f"train_{i:03d}.jpg" for i in (0, 1, 2, 9, 10, 11)]
    Path("list.txt").write_text("\n".join(names))
    options = ["--labels", "list.txt", "--epochs", "1", "--batch-size", "6"]
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    assert result_of("semisup-10percent")["images"]["labelled"]["images"] == 6
    Path("list.txt").write_text("train_000.jpg\nn01440764_123.JPEG\n")
    refused(evaluate("semisup", *common, *options), "n01440764_123.JPEG", "list.txt")


def test_svm_on_a_development_kit(evaluate: Train, common: list[Any], devkit: Path) -> None:
    arguments = [x for x in common if x not in ("--train", common[3])]
    status, text = evaluate("svm", *arguments, "--voc07", devkit)
    assert status == 0, text
    values = result_of("svm")
    assert 0 < values["results"]["map"] <= 100
    assert values["results"]["map"] == pytest.approx(
        np.mean([c["average_precision"] for c in values["each"].values()])
    )
    assert values["published"]["results"] == {"map": 86.2}


@pytest.fixture(scope="module")
def devkit(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures with one or two of three classes in each."""
    root = tmp_path_factory.mktemp("kit") / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    names = {"trainval": [], "test": []}
    for number, path in enumerate(sorted((labelled / "train").rglob("*.jpg"))):
        split = "trainval" if number % 2 else "test"
        names[split].append(f"{number:06d}")
        (root / "JPEGImages" / f"{number:06d}.jpg").write_bytes(path.read_bytes())
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        thing = f"<object><name>{path.parent.name}</name><difficult>{int(number % 10 == 0)}</difficult>{box}</object>"
        (root / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{thing}</annotation>")
    for split, ids in names.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root.parent.parent


def test_predict_by_a_vote_and_its_neighbours(
    evaluate: Train, pretrained: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # long paths are folded
    image = labelled / "train" / "class1" / "train_004.jpg"
    status, text = evaluate(
        "predict",
        "--checkpoint",
        pretrained,
        "--train",
        labelled,
        image,
        "--neighbours",
        "--json",
        "--k",
        "1",
        *CPU,
    )
    assert status == 0, text
    ((says,),) = [json.loads(text)]
    assert (says["pred_class"], says["pred_label"], says["pred_score"]) == ("class1", 1, 1.0)
    assert len(says["neighbours"]) == 5
    assert says["neighbours"][0]["image"] == str(image)  # itself
    assert says["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    status, text = evaluate(
        "predict", "--checkpoint", pretrained, "--train", labelled, image, "--neighbours", *CPU
    )
    assert status == 0, text
    assert "by a vote of the 20 most alike of 60 training images" in text
    assert text.count("train_004.jpg") == 2


def test_predict_prints_json_alone_and_says_what_neighbours_need(
    evaluate: Train, pretrained: Path, labelled: Path, tmp_path: Path
) -> None:
    image, pretrained = (
        labelled / "val" / "class2" / "val_002.jpg",
        Path(shutil.copytree(pretrained, "run")),
    )
    shutil.copytree(labelled / "train", tmp_path / "damaged")
    (tmp_path / "damaged" / "class0" / "bad.jpg").write_bytes(b"no image")
    command = [
        sys.executable,
        ROOT / "evaluate.py",
        "predict",
        "--checkpoint",
        pretrained,
        "--json",
        *CPU,
        image,
    ]
    said = subprocess.run(
        [*command, "--train", tmp_path / "damaged"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(said.stdout)) == 1
    assert "bad.jpg" in said.stderr
    assert (
        evaluate(
            "linear",
            "--checkpoint",
            pretrained,
            "--train",
            labelled,
            "--epochs",
            "1",
            "--batch-size",
            "20",
            *CPU,
        )[0]
        == 0
    )
    head = pretrained / "linear-imagenet.safetensors"
    refused(
        evaluate("predict", "--checkpoint", head, image, "--neighbours", *CPU),
        "error: name the images",
        "--train",
    )


def test_the_classifier_of_solo_learns_small_stem_keeps_its_border(
    evaluate: Train, labelled: Path
) -> None:
    """Two pixels: with one, as everywhere else, `predict` would look at other features than `linear`."""
    from model import Weights, build_backbone, export

    weights = Weights(
        "solo-learn", build_backbone("resnet18", 8, small_stem=True).state_dict(), {}, {}, [], 16
    )
    export(weights, "safetensors", Path("cifar.safetensors"))
    options = ["--epochs", "1", "--batch-size", "20", "--output", "out", *CPU]
    assert (
        evaluate("linear", "--checkpoint", "cifar.safetensors", "--train", labelled, *options)[0]
        == 0
    )
    load_classifier = importlib.import_module("evaluate").load_classifier
    kept = load_classifier("out/linear-imagenet.safetensors", device="cpu")
    assert kept._subject.backbone.conv1.padding == (2, 2)


def test_other_weights_in_the_folder_of_a_run_leave_its_results_alone(
    evaluate: Train, pretrained: Path, labelled: Path
) -> None:
    common, pretrained = ["--train", labelled, *CPU], Path(shutil.copytree(pretrained, "run"))
    assert evaluate("knn", "--checkpoint", pretrained, *common)[0] == 0
    before = (pretrained / "knn.json").read_bytes()
    shutil.copy(pretrained / "backbone.safetensors", pretrained / "tuned.safetensors")
    assert (
        evaluate("knn", "--checkpoint", pretrained / "tuned.safetensors", *common, "--k", "3")[0]
        == 0
    )
    assert (pretrained / "knn.json").read_bytes() == before
    assert json.loads((pretrained / "tuned" / "knn.json").read_text())["setup"]["k"] == 3
    assert (
        evaluate("knn", "--checkpoint", pretrained / "backbone.safetensors", *common, "--k", "3")[0]
        == 0
    )
    assert (pretrained / "knn.json").read_bytes() != before


def test_load_classifier_takes_paths_pictures_and_arrays(
    pretrained: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_classifier = importlib.import_module("evaluate").load_classifier
    classifier = load_classifier(pretrained, labelled, device="cpu")
    path = labelled / "val" / "class2" / "val_002.jpg"
    image = Image.open(path)
    says = classifier.predict(path)
    assert set(says) == {"pred_class", "pred_label", "pred_score"}
    assert (
        says
        == classifier.predict(str(path))
        == classifier.predict(image)
        == classifier.predict(np.asarray(image))
    )
    assert [p["pred_class"] for p in classifier.predict_batch([path, image])] == [
        says["pred_class"]
    ] * 2
    assert classifier.predict(image.convert("L"))["pred_class"] in {"class0", "class1", "class2"}
    assert classifier.predict_batch([]) == []
    with pytest.raises(ValueError, match="uint8"):
        classifier.predict(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(pretrained, device="cpu")


@pytest.mark.parametrize(
    "layout", ["torchvision", "timm", "mmpretrain", "solo-learn", "lightly", "safetensors"]
)
def test_export_is_read_again(
    evaluate: Train, common: list[Any], pretrained: Path, labelled: Path, layout: str
) -> None:
    status, text = evaluate(
        "export", "--checkpoint", pretrained, "--to", layout, "--output", "out", *CPU
    )
    assert status == 0, text
    (name,) = outputs()
    assert f"out/{name}" in text
    results = []
    for checkpoint in (pretrained, f"out/{name}"):
        command = [
            "knn",
            "--checkpoint",
            checkpoint,
            "--train",
            labelled,
            "--size",
            "16",
            "--output",
            "out",
            *CPU,
        ]
        assert evaluate(*command)[0] == 0
        results.append(result_of("knn")["results"])
    assert results[0] == results[1]


def test_compare_puts_runs_side_by_side(evaluate: Train, pretrained: Path, labelled: Path) -> None:
    for output, k in (("one", "1"), ("other", "7")):
        command = [
            "knn",
            "--checkpoint",
            pretrained,
            "--train",
            labelled,
            "--output",
            output,
            "--k",
            k,
            *CPU,
        ]
        assert evaluate(*command)[0] == 0
    status, text = evaluate("compare", "one", "other", pretrained)
    assert status == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("knn: knn_top1")]
    figures = [
        f"{json.loads(Path(name, 'knn.json').read_text())['results']['knn_top1']:.4g}"
        for name in ("one", "other")
    ]
    assert line.split()[2:6] == [*figures, "-", "45.6"]
    assert "pretraining's end: knn_top1" in text
    shutil.copytree("other", "again/one")  # of the same name, which is not the same run
    status, text = evaluate("compare", "one", "again/one")
    assert status == 0, text
    assert text.splitlines()[0].split()[:3] == ["evaluation", "one", "again/one"]
    Path("empty").mkdir()
    refused(evaluate("compare", "one", "empty"), "empty", "holds no results")
    refused(evaluate("compare", "absent"), "absent", "no folder")
