"""The verb evaluate.py as a user meets it: what each evaluation writes and says, and what it refuses."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Train, encoded, picture, refused, write_photos
from PIL import Image

import protocols

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu"]


@pytest.fixture
def evaluate(run_verb: Train) -> Train:
    """`evaluate.py` in this process, from an empty folder: (exit status, everything it said)."""
    return partial(run_verb, "evaluate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that colour tells apart: 60 images to learn from, 30 to be asked about."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("val", 30)):
        for i in range(count):
            path = root / split / f"class{i % 3}" / f"{split}_{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(picture(40 + i % 7, 36 + i % 5, seed=1000 * (split == "val") + i)).copy()
            pixels[..., i % 3] //= 4  # of one of red, green and blue there is little
            path.write_bytes(encoded(Image.fromarray(pixels), quality=90))
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, ROOT / "train.py", "--data", data, "--epochs", "1", *TINY, "--run", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return folder


@pytest.fixture
def common(run: Path, data: Path) -> list[Any]:
    return ["--checkpoint", run, "--train", data, "--output", "out", *QUICK]


def found(name: str) -> dict[str, Any]:
    return json.loads((Path("out") / f"{name}.json").read_text())


def files() -> set[str]:
    return {path.name for path in Path("out").iterdir()} if Path("out").exists() else set()


# ── what each finds ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_knn(evaluate: Train, common: list[Any], run: Path) -> None:
    status, text = evaluate("knn", *common, "--k", "5")
    assert status == 0, text
    values = found("knn")
    assert set(values["results"]) == {"knn_top1", "knn_top5", "effective_rank", "alignment", "uniformity"}
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


def test_linear_learns_and_leaves_a_classifier_for_predict(evaluate: Train, common: list[Any], data: Path) -> None:
    status, text = evaluate("linear", *common, "--epochs", "6", "--batch-size", "20", "--lr", "3")
    assert status == 0, text
    values = found("linear-imagenet")
    assert values["results"]["top1"] >= 70
    assert {"epochs 6, not 100", "batch 20, not 256", "lr 3, not 0.3"} <= set(values["differs"])
    assert not [said for said in values["differs"] if said.startswith("weight decay")]
    assert values["published"]["results"] == {"top1": 73.2, "top5": 91.0}
    assert files() == {"linear-imagenet.json", "linear-imagenet.safetensors"}

    pictures = sorted((data / "val").rglob("*.jpg"))
    status, text = evaluate("predict", "--checkpoint", "out/linear-imagenet.safetensors", "--json", *pictures, *QUICK)
    assert status == 0, text
    predicted = json.loads(text)
    assert [p["image"] for p in predicted] == [str(path) for path in pictures]
    right = [p["pred_class"] == path.parent.name for p, path in zip(predicted, pictures, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(values["results"]["top1"])  # the same test views
    assert all(p["pred_class"] == f"class{p['pred_label']}" and 1 / 3 <= p["pred_score"] <= 1 for p in predicted)


def test_a_sweep_trains_each_pair_as_if_it_were_alone(evaluate: Train, common: list[Any]) -> None:
    options = ["--epochs", "2", "--batch-size", "20"]
    status, text = evaluate("linear", *common, *options, "--lr", "0.3", "3", "--weight-decay", "0", "1e-3")
    assert status == 0, text
    heads = found("linear-imagenet-sweep")["heads"]
    assert [(h["lr"], h["weight decay"]) for h in heads] == [(0.3, 0), (0.3, 1e-3), (3, 0), (3, 1e-3)]
    status, text = evaluate("linear", *common, *options, "--lr", "3", "--weight-decay", "1e-3")
    assert status == 0, text
    alone = found("linear-imagenet")["heads"][0]
    assert alone == {name: pytest.approx(value, rel=1e-4) for name, value in heads[3].items()}
    assert found("linear-imagenet-sweep")["results"]["top1"] == max(h["top1"] for h in heads)
    assert "classifiers tried 4, not 1" in found("linear-imagenet-sweep")["differs"]
    assert len(protocols.parse(["linear", "--sweep"]).heads()) == 12  # type: ignore[union-attr]


def test_an_interrupted_linear_goes_on_to_the_same_classifier(evaluate: Train, common: list[Any]) -> None:
    options = ["linear", *common, "--epochs", "4", "--batch-size", "20"]
    assert evaluate(*options)[0] == 0
    whole = Path("out/linear-imagenet.safetensors").read_bytes()
    Path("out/linear-imagenet.safetensors").unlink()

    import model.heads

    saved = model.heads.save_checkpoint

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.heads, "save_checkpoint", save_and_stop)
        assert evaluate(*options)[0] == 130
    assert "linear-imagenet.unfinished.pt" in files()
    status, text = evaluate(*options, "--resume")
    assert status == 0, text
    assert Path("out/linear-imagenet.safetensors").read_bytes() == whole
    refused(evaluate(*options, "--resume"), "--resume", "nothing")
    refused(evaluate(*options, "--output", "new", "--resume"), "--resume", "nothing")
    assert not Path("new").exists()


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_semisup_tunes_the_network(evaluate: Train, common: list[Any], run: Path, preset: str) -> None:
    options = ["--labels", "0.1", "--preset", preset, "--epochs", "3", "--batch-size", "3"]
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    values = found("semisup-10percent")
    assert values["setup"]["labelled images"] == 6
    assert values["images"]["labelled"]["images"] == 6
    assert values["setup"]["backbone lr"] == {"paper": 0.002, "authors": 0.005}[preset]
    assert values["published"]["results"] == {"top1": 69.7, "top5": 89.3}
    assert ("backbone lr 0.005, not 0.002" in values["differs"]) == (preset == "authors")  # the figures are the paper's
    from safetensors.torch import load_file

    tuned = load_file("out/semisup-10percent.safetensors")
    before = torch.load(run / "backbone.pth", weights_only=True)
    assert not torch.equal(tuned["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(tuned["bn1.running_mean"], before["bn1.running_mean"])  # batch statistics are learned too


def test_semisup_takes_simclrs_lists(evaluate: Train, common: list[Any], data: Path) -> None:
    names = [f"train_{i:03d}.jpg" for i in (0, 1, 2, 9, 10, 11)]
    Path("list.txt").write_text("\n".join(names))
    options = ["--labels", "list.txt", "--epochs", "1", "--batch-size", "6"]
    status, text = evaluate("semisup", *common, *options)
    assert status == 0, text
    assert found("semisup-10percent")["images"]["labelled"]["images"] == 6
    Path("list.txt").write_text("train_000.jpg\nn01440764_123.JPEG\n")
    refused(evaluate("semisup", *common, *options), "n01440764_123.JPEG", "list.txt")


def test_svm_on_a_development_kit(evaluate: Train, common: list[Any], devkit: Path) -> None:
    arguments = [x for x in common if x not in ("--train", common[3])]
    status, text = evaluate("svm", *arguments, "--voc07", devkit)
    assert status == 0, text
    values = found("svm")
    assert 0 < values["results"]["map"] <= 100
    assert values["results"]["map"] == pytest.approx(np.mean([c["average_precision"] for c in values["each"].values()]))
    assert values["published"]["results"] == {"map": 86.2}


@pytest.fixture(scope="module")
def devkit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures with one or two of three classes in each."""
    root = tmp_path_factory.mktemp("kit") / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    names = {"trainval": [], "test": []}
    for number, path in enumerate(sorted((data / "train").rglob("*.jpg"))):
        split = "trainval" if number % 2 else "test"
        names[split].append(f"{number:06d}")
        (root / "JPEGImages" / f"{number:06d}.jpg").write_bytes(path.read_bytes())
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        thing = f"<object><name>{path.parent.name}</name><difficult>{int(number % 10 == 0)}</difficult>{box}</object>"
        (root / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{thing}</annotation>")
    for split, ids in names.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root.parent.parent


def test_predict_by_a_vote_and_its_neighbours(evaluate: Train, run: Path, data: Path) -> None:
    image = data / "train" / "class1" / "train_004.jpg"
    status, text = evaluate(
        "predict", "--checkpoint", run, "--train", data, image, "--neighbours", "--json", "--k", "1", *QUICK
    )
    assert status == 0, text
    ((says,),) = [json.loads(text)]
    assert (says["pred_class"], says["pred_label"], says["pred_score"]) == ("class1", 1, 1.0)
    assert len(says["neighbours"]) == 5
    assert says["neighbours"][0]["image"] == str(image)  # itself
    assert says["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    status, text = evaluate("predict", "--checkpoint", run, "--train", data, image, "--neighbours", *QUICK)
    assert status == 0, text
    assert "by a vote of the 20 most alike of 60 training images" in text
    assert "".join(text.split()).count("train_004.jpg") == 2  # long paths are folded


def test_predict_prints_json_alone_and_says_what_neighbours_need(
    evaluate: Train, run: Path, data: Path, tmp_path: Path
) -> None:
    image, run = data / "val" / "class2" / "val_002.jpg", Path(shutil.copytree(run, "run"))
    shutil.copytree(data / "train", tmp_path / "damaged")
    (tmp_path / "damaged" / "class0" / "bad.jpg").write_bytes(b"no image")
    command = [sys.executable, ROOT / "evaluate.py", "predict", "--checkpoint", run, "--json", *QUICK, image]
    said = subprocess.run([*command, "--train", tmp_path / "damaged"], capture_output=True, text=True, check=True)
    assert len(json.loads(said.stdout)) == 1
    assert "bad.jpg" in said.stderr
    assert (
        evaluate("linear", "--checkpoint", run, "--train", data, "--epochs", "1", "--batch-size", "20", *QUICK)[0] == 0
    )
    head = run / "linear-imagenet.safetensors"
    refused(
        evaluate("predict", "--checkpoint", head, image, "--neighbours", *QUICK), "error: name the images", "--train"
    )


def test_the_classifier_of_solo_learns_small_stem_keeps_its_border(evaluate: Train, data: Path) -> None:
    """Two pixels: with one, as everywhere else, `predict` would look at other features than `linear`."""
    from model import Weights, build_backbone, export

    weights = Weights("solo-learn", build_backbone("resnet18", 8, small_stem=True).state_dict(), {}, {}, [], 16)
    export(weights, "safetensors", Path("cifar.safetensors"))
    options = ["--epochs", "1", "--batch-size", "20", "--output", "out", *QUICK]
    assert evaluate("linear", "--checkpoint", "cifar.safetensors", "--train", data, *options)[0] == 0
    load_classifier = importlib.import_module("evaluate").load_classifier
    kept = load_classifier("out/linear-imagenet.safetensors", device="cpu")
    assert kept._subject.backbone.conv1.padding == (2, 2)


def test_other_weights_in_the_folder_of_a_run_leave_its_results_alone(evaluate: Train, run: Path, data: Path) -> None:
    common, run = ["--train", data, *QUICK], Path(shutil.copytree(run, "run"))
    assert evaluate("knn", "--checkpoint", run, *common)[0] == 0
    before = (run / "knn.json").read_bytes()
    shutil.copy(run / "backbone.safetensors", run / "tuned.safetensors")
    assert evaluate("knn", "--checkpoint", run / "tuned.safetensors", *common, "--k", "3")[0] == 0
    assert (run / "knn.json").read_bytes() == before
    assert json.loads((run / "tuned" / "knn.json").read_text())["setup"]["k"] == 3
    assert evaluate("knn", "--checkpoint", run / "backbone.safetensors", *common, "--k", "3")[0] == 0
    assert (run / "knn.json").read_bytes() != before


def test_load_classifier_takes_paths_pictures_and_arrays(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_classifier = importlib.import_module("evaluate").load_classifier
    classifier = load_classifier(run, data, device="cpu")
    path = data / "val" / "class2" / "val_002.jpg"
    image = Image.open(path)
    says = classifier.predict(path)
    assert set(says) == {"pred_class", "pred_label", "pred_score"}
    assert says == classifier.predict(str(path)) == classifier.predict(image) == classifier.predict(np.asarray(image))
    assert [p["pred_class"] for p in classifier.predict_batch([path, image])] == [says["pred_class"]] * 2
    assert classifier.predict(image.convert("L"))["pred_class"] in {"class0", "class1", "class2"}
    assert classifier.predict_batch([]) == []
    with pytest.raises(ValueError, match="uint8"):
        classifier.predict(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(run, device="cpu")


@pytest.mark.parametrize("layout", ["torchvision", "timm", "mmpretrain", "solo-learn", "lightly", "safetensors"])
def test_export_is_read_again(evaluate: Train, common: list[Any], run: Path, data: Path, layout: str) -> None:
    status, text = evaluate("export", "--checkpoint", run, "--to", layout, "--output", "out", *QUICK)
    assert status == 0, text
    (name,) = files()
    assert f"out/{name}" in text
    results = []
    for checkpoint in (run, f"out/{name}"):
        command = ["knn", "--checkpoint", checkpoint, "--train", data, "--size", "16", "--output", "out", *QUICK]
        assert evaluate(*command)[0] == 0
        results.append(found("knn")["results"])
    assert results[0] == results[1]


def test_compare_puts_runs_side_by_side(evaluate: Train, run: Path, data: Path) -> None:
    for output, k in (("one", "1"), ("other", "7")):
        command = ["knn", "--checkpoint", run, "--train", data, "--output", output, "--k", k, *QUICK]
        assert evaluate(*command)[0] == 0
    status, text = evaluate("compare", "one", "other", run)
    assert status == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("knn: knn_top1")]
    figures = [
        f"{json.loads(Path(run, 'knn.json').read_text())['results']['knn_top1']:.4g}" for run in ("one", "other")
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


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

EVALUATIONS = [["knn"], ["linear", "--epochs", "1", "--batch-size", "4"], ["semisup", "--labels", "1", "--epochs", "1"]]


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: command[0])
def test_data_that_cannot_be_evaluated_on(
    evaluate: Train, run: Path, data: Path, flat: Path, command: list[str]
) -> None:
    def tried(*arguments: object) -> tuple[int, str]:
        return evaluate(*command, "--checkpoint", run, "--output", "out", *QUICK, *arguments)

    refused(tried("--train", flat, "--test", flat), "labels")
    refused(tried("--train", flat, "--test", data / "val"), "labels are needed", str(flat))
    refused(tried("--train", data / "train"), "--test")
    refused(tried("--train", "nowhere"), "nowhere")
    write_photos(Path("other"), 8, classes=4)
    refused(tried("--train", data, "--test", "other"), "class3", "train")
    assert not files()


@pytest.mark.parametrize("command", [*EVALUATIONS, ["export"], ["svm"], ["predict"]], ids=lambda command: command[0])
def test_checkpoints_that_cannot_be_evaluated(evaluate: Train, run: Path, data: Path, command: list[str]) -> None:
    rest = ["--train", data] if command in EVALUATIONS else [data / "val"] if command == ["predict"] else []

    def tried(checkpoint: object) -> tuple[int, str]:
        return evaluate(*command, *rest, "--checkpoint", checkpoint, "--output", "out", *QUICK)

    refused(tried("absent.pth"), "absent.pth")
    Path("cut.pth").write_bytes((run / "backbone.pth").read_bytes()[:-1000])
    refused(tried("cut.pth"), "cut.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "vit.pth")
    refused(tried("vit.pth"), "vit.pth", "patch_embed")
    missing = torch.load(run / "backbone.pth", weights_only=True)
    del missing["layer1.0.conv1.weight"]
    torch.save(missing, "missing.pth")
    refused(tried("missing.pth"), "missing.pth", "layer1.0.conv1.weight")
    assert not files()


def test_a_checkpoint_with_code_in_it_is_read_and_nothing_is_run(evaluate: Train, run: Path, data: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    torch.save({"state_dict": torch.load(run / "backbone.pth", weights_only=True), "callback": Evil()}, "evil.pth")
    status, text = evaluate(
        "knn", "--checkpoint", "evil.pth", "--train", data, "--size", "16", "--output", "out", *QUICK
    )
    assert not Path("ran").exists()
    assert status == 0, text  # its weights are good


def test_checkpoints_that_are_no_files_or_are_damaged_in_what_they_say(
    evaluate: Train, run: Path, data: Path, run_verb: Train
) -> None:
    def tried(checkpoint: str) -> tuple[int, str]:
        return evaluate("export", "--checkpoint", checkpoint, "--output", "out", *QUICK)

    os.mkfifo("pipe.pth")
    refused(tried("pipe.pth"), "pipe.pth is a directory, pipe or device")  # and it is not waited for
    Path("empty").mkdir()
    refused(tried("empty"), "empty holds no checkpoint.pt", "name the file")
    weights = torch.load(run / "backbone.pth", weights_only=True)
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] / 0}, "nan.pth")
    refused(tried("nan.pth"), "nan.pth", "conv1.weight", "not finite")
    from safetensors.torch import save_file

    save_file(weights, "odd.safetensors", {"twinfeed": json.dumps({"layout": ["x"], "classes": "abc"})})
    assert tried("odd.safetensors")[0] == 0
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"architectures": ["ResNet"]}')  # as a folder of a model hub has it
    os.rename("odd.safetensors", "hub/model.safetensors")
    assert evaluate("export", "--checkpoint", "hub/model.safetensors", *QUICK)[0] == 0
    assert Path("runs/model/torchvision.pth").exists()
    refused(
        run_verb("train", "--data", data, *TINY, "--continue-from", run / "backbone.pth"), "backbone.pth", "projector"
    )


@pytest.mark.parametrize("command", [*EVALUATIONS, ["export"]], ids=lambda command: command[0])
def test_an_output_that_is_no_folder_is_known_before_the_work(evaluate: Train, run: Path, command: list[str]) -> None:
    Path("file").touch()
    for output in ("file", "file/below"):  # images that are not there would be found out next
        rest = [] if command == ["export"] else ["--train", "nowhere"]
        refused(evaluate(*command, *rest, "--checkpoint", run, "--output", output, *QUICK), "file", "--output")


def test_it_is_one_process(evaluate: Train, common: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(evaluate("knn", *common), "without torchrun")


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: command[0])
def test_test_images_none_of_which_can_be_read_are_no_result(
    evaluate: Train, run: Path, data: Path, command: list[str]
) -> None:
    for i in range(2):
        path = Path("bad") / f"class{i}" / f"{i}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes((data / "val" / "class0" / "val_000.jpg").read_bytes()[:-300])
    tried = [*command, "--checkpoint", run, "--train", data, "--test", "bad", "--output", "out", *QUICK]
    if command[0] == "semisup":
        tried += ["--batch-size", "20"]
    refused(evaluate(*tried), "none of the 2 images", "0.jpg")
    assert not [name for name in files() if name.endswith((".json", ".safetensors"))]
    path.write_bytes((data / "val" / "class1" / "val_001.jpg").read_bytes())  # one that can: no pair for the uniformity
    status, text = evaluate(*tried)
    assert status == 0, text


def test_some_images_without_a_label_among_others(
    evaluate: Train, run_verb: Train, run: Path, data: Path, shards: Path
) -> None:
    """As WebDataset shards can have them: refused by evaluations, and no test behind a pretraining."""
    common = ["--checkpoint", run, "--output", "out", *QUICK]
    for command in EVALUATIONS:
        refused(evaluate(*command, *common, "--train", shards), "labels are needed", "12 of 60 images")
        refused(evaluate(*command, *common, "--train", data, "--test", shards / "val"), "labels are needed", "6 of 30")
    picture = data / "val" / "class0" / "val_000.jpg"
    refused(evaluate("predict", *common, "--train", shards, picture), "labels are needed", "12 of 60 images")
    said = evaluate("predict", *common, "--train", data, picture, picture.parent)
    refused(said, "is no file")
    assert "looking at" not in said[1]  # 50,000 images, before it is said
    assert not files()
    status, text = run_verb("train", "--data", shards, "--epochs", "1", *TINY)
    assert status == 0, text
    assert "has images without labels: no kNN test" in text


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as WebDataset, every fifth without a label."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "part-0.tar", "w") as tar:
            for number, path in enumerate(sorted((data / split).rglob("*.jpg"))):
                for suffix, content in ((".jpg", path.read_bytes()), (".cls", path.parent.name[-1:].encode())):
                    if suffix == ".jpg" or number % 5:
                        info = tarfile.TarInfo(f"{number:04d}{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return root


def test_compare_tells_folders_of_one_name_apart_and_survives_others_files(
    evaluate: Train, run: Path, data: Path
) -> None:
    for output, k in (("a/same", "1"), ("b/same", "60")):
        assert evaluate("knn", "--checkpoint", run, "--train", data, "--output", output, "--k", k, *QUICK)[0] == 0
    status, text = evaluate("compare", "a/same", "b/same", "a/same")
    assert status == 0, text
    assert text.split()[:3] == ["evaluation", "a/same", "b/same"]
    values = [json.loads(Path(name, "same/knn.json").read_text())["results"]["knn_top1"] for name in "ab"]
    (line,) = [line for line in text.splitlines() if line.startswith("knn: knn_top1")]
    assert line.split()[2:] == [*(f"{value:.4g}" for value in values), "45.6"]
    Path("a/same/said.json").write_text('[{"image": "cat.jpg"}]')
    Path("a/same/summary.json").write_text("[1]")
    Path("a/same/svm.json").write_text('{"evaluation": "svm", "results": 3, "published": 4, "differs": 5}')
    Path("a/same/semisup.json").write_text('{"evaluation"')
    status, text = evaluate("compare", "a/same")
    assert status == 0, text
    assert [line.split(",")[0] for line in text.splitlines() if "damaged" in line] == [
        "left out a/same/semisup.json",
        "left out a/same/svm.json",
    ]


def test_an_image_that_cannot_be_read(evaluate: Train, run: Path, data: Path) -> None:
    good = data / "val" / "class0" / "val_000.jpg"
    Path("bad.jpg").write_bytes(good.read_bytes()[:200])
    Path("text.txt").write_text("no image")
    for name in ("bad.jpg", "text.txt", "absent.jpg", "."):
        refused(evaluate("predict", "--checkpoint", run, "--train", data, good, name, *QUICK), name)
    refused(evaluate("predict", "--checkpoint", run, *QUICK), "IMAGE")
    refused(evaluate("predict", "--checkpoint", run, good, *QUICK), "--train", "linear")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("knn --k 0", "--k is 0"),
        ("knn --temperature 0", "--temperature is 0"),
        ("linear --epochs 0", "--epochs is 0"),
        ("linear --lr 0.1 -1", "--lr"),
        ("linear --weight-decay -1", "--weight-decay"),
        ("semisup --labels 1.5", "1.5"),
        ("semisup --labels nowhere.txt", "--labels nowhere.txt: neither a fraction nor a file"),
        ("semisup --labels 10%", "--labels 10%: neither a fraction nor a file"),
        ("semisup --batch-size 0", "--batch-size is 0"),
        ("knn --size 0", "--size is 0"),
        ("knn --threads 0", "--threads is 0"),
        ("svm --voc07 nowhere", "nowhere"),
    ],
)
def test_what_no_evaluation_can_be_made_of(evaluate: Train, run: Path, data: Path, command: str, words: str) -> None:
    rest = [] if command.startswith("svm") else ["--train", data]
    refused(evaluate(*command.split(), "--checkpoint", run, "--output", "out", *rest, *QUICK), words)
    assert not files()


def test_without_a_demo_run_it_says_what_to_do(evaluate: Train) -> None:
    for command in ("knn", "linear", "semisup", "svm", "predict", "export"):
        refused(evaluate(command), "runs/demo", "train.py")


# ── what is published ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_published_protocols() -> None:
    """The table of the method, typed a second time."""
    jobs = {name: protocols.parse(["linear", "--train", "x", "--preset", name]) for name in protocols.LINEAR}
    found = {
        name: (*job.protocol()[1][:3], job.protocol()[1].milestones, job.published().results["top1"])  # type: ignore[union-attr]
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
    rows = [line.split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    measured = {row[0].removeprefix("| ").partition(" (")[0]: row[3] for row in rows if len(row) == 5}
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
        record = json.loads((ROOT / "bench" / "results" / "evaluate-demo" / f"{name}.json").read_text())
        assert cell == " / ".join(f"{record['results'][figure]:.1f}" for figure in figures), name
        assert "-dirty" not in record["environment"]["commit"], name


@pytest.mark.parametrize("name", ["imagenet", "mmpretrain", "places205", "inat18"])
def test_the_published_set_up_differs_in_nothing(name: str) -> None:
    """What `differs` says is true: nothing where the command is the published one."""
    import results

    job = protocols.parse(["linear", "--train", "x", "--preset", name])
    assert isinstance(job, protocols.Linear)
    data = {key: value for key, value in job.published().setup.items() if key in ("training images", "classes")}
    epochs = 300 if name == "mmpretrain" else 1000
    network = {"backbone": "resnet50", "pretraining epochs": epochs, "view, px": 224}
    ((lr, decay),) = job.heads()
    setup = network | data | {"batch": job.batch_size, "precision": job.precision} | job.protocol()[1].setup
    setup["classifiers tried"] = len(job.heads())
    assert results.differences(setup | {"lr": lr, "weight decay": decay}, job.published()) == []
