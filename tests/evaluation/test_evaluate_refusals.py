"""Bad input of evaluate.py is refused in one line, before anything is written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.images import write_photos
from tests.helpers.runs import CPU, TINY, Command, assert_refused, outputs

EVALUATIONS = [
    ["knn"],
    ["linear", "--epochs", "1", "--batch-size", "4"],
    ["semisup", "--labels", "1", "--epochs", "1"],
]


def command_name(command: list[str]) -> str:
    return command[0]


# --- Images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EVALUATIONS, ids=command_name)
def test_images_that_cannot_be_evaluated_on(
    evaluate: Command, pretrained: Path, labelled: Path, unlabelled: Path, command: list[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        return evaluate(*command, "--checkpoint", pretrained, "--output", "out", *CPU, *arguments)

    assert_refused(run("--train", unlabelled, "--test", unlabelled), "has no label")
    assert_refused(
        run("--train", unlabelled, "--test", labelled / "val"), "has no label", str(unlabelled)
    )
    assert_refused(run("--train", labelled / "train"), "--test")
    assert_refused(run("--train", "nowhere"), "nowhere")
    write_photos(Path("other"), 8, classes=4)
    assert_refused(run("--train", labelled, "--test", "other"), "class3", "train")
    assert not outputs()


@pytest.fixture(scope="module")
def shards(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as WebDataset shards, every fifth without a label."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "part-0.tar", "w") as tar:
            for number, path in enumerate(sorted((labelled / split).rglob("*.jpg"))):
                members = {f"{number:04d}.jpg": path.read_bytes()}
                if number % 5:
                    members[f"{number:04d}.cls"] = path.parent.name[-1:].encode()
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("command", EVALUATIONS, ids=command_name)
def test_evaluations_need_a_label_for_every_image(
    evaluate: Command, common: list[Any], labelled: Path, shards: Path, command: list[str]
) -> None:
    assert_refused(evaluate(*command, *common, "--train", shards), "has no label", "12 of 60")
    result = evaluate(*command, *common, "--train", labelled, "--test", shards / "val")
    assert_refused(result, "has no label", "6 of 30")
    assert not outputs()


def test_a_vote_needs_a_label_for_every_image(
    evaluate: Command, pretrained: Path, labelled: Path, shards: Path
) -> None:
    image = labelled / "val" / "class0" / "val_000.jpg"
    options = ["--checkpoint", pretrained, "--train", shards, image, *CPU]
    assert_refused(evaluate("predict", *options), "has no label", "12 of 60 images")


def test_pretraining_runs_without_a_knn_test_if_a_label_is_missing(
    train: Command, shards: Path
) -> None:
    status, text = train("--data", shards, "--epochs", "1", *TINY)
    assert status == 0, text
    assert "no kNN test: " in text
    assert " has images without labels" in text


@pytest.mark.parametrize("command", EVALUATIONS, ids=command_name)
def test_a_test_set_without_a_readable_image(
    evaluate: Command, common: list[Any], labelled: Path, command: list[str]
) -> None:
    paths = [Path("bad") / f"class{i}" / f"{i}.jpg" for i in range(2)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes((labelled / "val" / "class0" / "val_000.jpg").read_bytes()[:-300])
    options = [*command, *common, "--test", "bad"]
    if command[0] == "semisup":
        options += ["--batch-size", "20"]
    assert_refused(evaluate(*options), "none of the 2 images", "0.jpg")
    assert not [name for name in outputs() if name.endswith((".json", ".safetensors"))]

    # One readable image is enough, although uniformity needs a pair.
    paths[1].write_bytes((labelled / "val" / "class1" / "val_001.jpg").read_bytes())
    status, text = evaluate(*options)
    assert status == 0, text


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [*EVALUATIONS, ["export"], ["svm"], ["predict"]], ids=command_name
)
def test_checkpoints_that_cannot_be_evaluated(
    evaluate: Command, pretrained: Path, labelled: Path, command: list[str]
) -> None:
    images: list[object] = []
    if command in EVALUATIONS:
        images = ["--train", labelled]
    if command == ["predict"]:
        images = [labelled / "val"]

    def run(checkpoint: str) -> tuple[int, str]:
        return evaluate(*command, *images, "--checkpoint", checkpoint, "--output", "out", *CPU)

    assert_refused(run("absent.pth"), "absent.pth", "--checkpoint")
    Path("cut.pth").write_bytes((pretrained / "backbone.pth").read_bytes()[:-1000])
    assert_refused(run("cut.pth"), "cut.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "vit.pth")
    assert_refused(run("vit.pth"), "vit.pth", "patch_embed")
    missing = torch.load(pretrained / "backbone.pth", weights_only=True)
    del missing["layer1.0.conv1.weight"]
    torch.save(missing, "missing.pth")
    assert_refused(run("missing.pth"), "missing.pth", "layer1.0.conv1.weight")
    assert not outputs()


@pytest.mark.parametrize("command", ["knn", "linear", "semisup", "svm", "predict", "export"])
def test_without_a_demo_run_the_remedy_is_named(evaluate: Command, command: str) -> None:
    assert_refused(evaluate(command), "runs/demo", "train.py")


def test_code_in_a_checkpoint_is_not_run(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    weights = torch.load(pretrained / "backbone.pth", weights_only=True)
    torch.save({"state_dict": weights, "callback": Evil()}, "evil.pth")
    options = ["--train", labelled, "--size", "16", "--output", "out", *CPU]
    status, text = evaluate("knn", "--checkpoint", "evil.pth", *options)
    assert not Path("ran").exists()
    assert status == 0, text  # the weights beside it are good


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(evaluate: Command) -> None:
    os.mkfifo("pipe.pth")
    result = evaluate("export", "--checkpoint", "pipe.pth", "--output", "out", *CPU)
    assert_refused(result, "pipe.pth is a directory, pipe or device")


def test_a_folder_without_a_checkpoint(evaluate: Command) -> None:
    Path("empty").mkdir()
    result = evaluate("export", "--checkpoint", "empty", "--output", "out", *CPU)
    assert_refused(result, "empty", "no checkpoint.pt", "name the file")


def test_weights_that_are_not_finite(evaluate: Command, pretrained: Path) -> None:
    weights = torch.load(pretrained / "backbone.pth", weights_only=True)
    weights["conv1.weight"] /= 0
    torch.save(weights, "nan.pth")
    result = evaluate("export", "--checkpoint", "nan.pth", "--output", "out", *CPU)
    assert_refused(result, "nan.pth", "conv1.weight", "not finite")


def test_odd_metadata_of_weights_is_ignored(evaluate: Command, pretrained: Path) -> None:
    weights = torch.load(pretrained / "backbone.pth", weights_only=True)
    metadata = {"twinfeed": json.dumps({"layout": ["x"], "classes": "abc"})}
    save_file(weights, "odd.safetensors", metadata)
    options = ["--checkpoint", "odd.safetensors", "--output", "out", *CPU]
    assert evaluate("export", *options)[0] == 0


def test_a_folder_of_a_model_hub_is_not_taken_for_a_run(
    evaluate: Command, pretrained: Path
) -> None:
    """It has a config.json too; results are not written beside its weights."""
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"architectures": ["ResNet"]}')
    save_file(torch.load(pretrained / "backbone.pth", weights_only=True), "hub/model.safetensors")
    assert evaluate("export", "--checkpoint", "hub/model.safetensors", *CPU)[0] == 0
    assert Path("runs/model/torchvision.pth").exists()


def test_pretraining_cannot_continue_from_a_backbone_alone(
    train: Command, pretrained: Path, labelled: Path
) -> None:
    backbone = pretrained / "backbone.pth"
    result = train("--data", labelled, *TINY, "--continue-from", backbone)
    assert_refused(result, "backbone.pth", "projector")


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["file", "file/below"])
@pytest.mark.parametrize("command", [*EVALUATIONS, ["export"]], ids=command_name)
def test_an_output_that_is_not_a_folder_is_refused_before_the_work(
    evaluate: Command, pretrained: Path, command: list[str], output: str
) -> None:
    Path("file").touch()
    # Images that do not exist would be the next error.
    images = [] if command == ["export"] else ["--train", "nowhere"]
    options = ["--checkpoint", pretrained, "--output", output, *CPU]
    assert_refused(evaluate(*command, *images, *options), "file", "--output")


def test_several_processes_are_refused(
    evaluate: Command, common: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(evaluate("knn", *common), "without torchrun")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("knn --k 0", "--k is 0"),
        ("knn --temperature 0", "--temperature is 0"),
        ("linear --epochs 0", "--epochs is 0"),
        ("linear --lr 0.1 -1", "--lr"),
        ("linear --weight-decay -1", "--weight-decay"),
        ("linear --milestones 4 -8", "--milestones is (4, -8)"),
        ("semisup --labels 1.5", "1.5"),
        ("semisup --labels nowhere.txt", "--labels nowhere.txt is neither a fraction nor an exist"),
        ("semisup --labels 10%", "--labels 10% is neither a fraction nor an existing file"),
        ("semisup --batch-size 0", "--batch-size is 0"),
        ("semisup --lr 0", "--lr is 0"),
        ("semisup --backbone-lr inf", "--backbone-lr is inf"),
        ("knn --size 0", "--size is 0"),
        ("knn --threads 0", "--threads is 0"),
    ],
)
def test_options_out_of_range(
    evaluate: Command, common: list[Any], command: str, words: str
) -> None:
    assert_refused(evaluate(*command.split(), *common), words)
    assert not outputs()


@pytest.mark.parametrize(
    ("option", "words"), [("--voc07 nowhere", "nowhere"), ("--threads 0", "--threads is 0")]
)
def test_svm_options_out_of_range(
    evaluate: Command, pretrained: Path, option: str, words: str
) -> None:
    result = evaluate("svm", "--checkpoint", pretrained, "--output", "out", *option.split(), *CPU)
    assert_refused(result, words)
    assert not outputs()
