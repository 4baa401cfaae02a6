"""What evaluate.py refuses, in one line and before anything is written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.images import write_photos
from tests.helpers.runs import CPU, TINY, Train, outputs, refused

ROOT = Path(__file__).parents[2]


EVALUATIONS = [
    ["knn"],
    ["linear", "--epochs", "1", "--batch-size", "4"],
    ["semisup", "--labels", "1", "--epochs", "1"],
]


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: command[0])
def test_data_that_cannot_be_evaluated_on(
    evaluate: Train, pretrained: Path, labelled: Path, flat: Path, command: list[str]
) -> None:
    def tried(*arguments: object) -> tuple[int, str]:
        return evaluate(*command, "--checkpoint", pretrained, "--output", "out", *CPU, *arguments)

    refused(tried("--train", flat, "--test", flat), "labels")
    refused(tried("--train", flat, "--test", labelled / "val"), "labels are needed", str(flat))
    refused(tried("--train", labelled / "train"), "--test")
    refused(tried("--train", "nowhere"), "nowhere")
    write_photos(Path("other"), 8, classes=4)
    refused(tried("--train", labelled, "--test", "other"), "class3", "train")
    assert not outputs()


@pytest.mark.parametrize(
    "command", [*EVALUATIONS, ["export"], ["svm"], ["predict"]], ids=lambda command: command[0]
)
def test_checkpoints_that_cannot_be_evaluated(
    evaluate: Train, pretrained: Path, labelled: Path, command: list[str]
) -> None:
    rest = (
        ["--train", labelled]
        if command in EVALUATIONS
        else [labelled / "val"]
        if command == ["predict"]
        else []
    )

    def tried(checkpoint: object) -> tuple[int, str]:
        return evaluate(*command, *rest, "--checkpoint", checkpoint, "--output", "out", *CPU)

    refused(tried("absent.pth"), "absent.pth")
    Path("cut.pth").write_bytes((pretrained / "backbone.pth").read_bytes()[:-1000])
    refused(tried("cut.pth"), "cut.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "vit.pth")
    refused(tried("vit.pth"), "vit.pth", "patch_embed")
    missing = torch.load(pretrained / "backbone.pth", weights_only=True)
    del missing["layer1.0.conv1.weight"]
    torch.save(missing, "missing.pth")
    refused(tried("missing.pth"), "missing.pth", "layer1.0.conv1.weight")
    assert not outputs()


def test_a_checkpoint_with_code_in_it_is_read_and_nothing_is_run(
    evaluate: Train, pretrained: Path, labelled: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    torch.save(
        {
            "state_dict": torch.load(pretrained / "backbone.pth", weights_only=True),
            "callback": Evil(),
        },
        "evil.pth",
    )
    status, text = evaluate(
        "knn",
        "--checkpoint",
        "evil.pth",
        "--train",
        labelled,
        "--size",
        "16",
        "--output",
        "out",
        *CPU,
    )
    assert not Path("ran").exists()
    assert status == 0, text  # its weights are good


def test_checkpoints_that_are_no_files_or_are_damaged_in_what_they_say(
    evaluate: Train, pretrained: Path, labelled: Path, run_verb: Train
) -> None:
    def tried(checkpoint: str) -> tuple[int, str]:
        return evaluate("export", "--checkpoint", checkpoint, "--output", "out", *CPU)

    os.mkfifo("pipe.pth")
    refused(
        tried("pipe.pth"), "pipe.pth is a directory, pipe or device"
    )  # and it is not waited for
    Path("empty").mkdir()
    refused(tried("empty"), "empty has no checkpoint.pt", "name the file")
    weights = torch.load(pretrained / "backbone.pth", weights_only=True)
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] / 0}, "nan.pth")
    refused(tried("nan.pth"), "nan.pth", "conv1.weight", "not finite")
    from safetensors.torch import save_file

    save_file(
        weights, "odd.safetensors", {"twinfeed": json.dumps({"layout": ["x"], "classes": "abc"})}
    )
    assert tried("odd.safetensors")[0] == 0
    Path("hub").mkdir()
    Path("hub/config.json").write_text(
        '{"architectures": ["ResNet"]}'
    )  # as a folder of a model hub has it
    os.rename("odd.safetensors", "hub/model.safetensors")
    assert evaluate("export", "--checkpoint", "hub/model.safetensors", *CPU)[0] == 0
    assert Path("runs/model/torchvision.pth").exists()
    refused(
        run_verb(
            "train", "--data", labelled, *TINY, "--continue-from", pretrained / "backbone.pth"
        ),
        "backbone.pth",
        "projector",
    )


@pytest.mark.parametrize("command", [*EVALUATIONS, ["export"]], ids=lambda command: command[0])
def test_an_output_that_is_no_folder_is_known_before_the_work(
    evaluate: Train, pretrained: Path, command: list[str]
) -> None:
    Path("file").touch()
    for output in ("file", "file/below"):  # images that are not there would be found out next
        rest = [] if command == ["export"] else ["--train", "nowhere"]
        refused(
            evaluate(*command, *rest, "--checkpoint", pretrained, "--output", output, *CPU),
            "file",
            "--output",
        )


def test_it_is_one_process(
    evaluate: Train, common: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(evaluate("knn", *common), "without torchrun")


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: command[0])
def test_test_images_none_of_which_can_be_read_are_no_result(
    evaluate: Train, pretrained: Path, labelled: Path, command: list[str]
) -> None:
    for i in range(2):
        path = Path("bad") / f"class{i}" / f"{i}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes((labelled / "val" / "class0" / "val_000.jpg").read_bytes()[:-300])
    tried = [
        *command,
        "--checkpoint",
        pretrained,
        "--train",
        labelled,
        "--test",
        "bad",
        "--output",
        "out",
        *CPU,
    ]
    if command[0] == "semisup":
        tried += ["--batch-size", "20"]
    refused(evaluate(*tried), "none of the 2 images", "0.jpg")
    assert not [name for name in outputs() if name.endswith((".json", ".safetensors"))]
    path.write_bytes(
        (labelled / "val" / "class1" / "val_001.jpg").read_bytes()
    )  # one that can: no pair for the uniformity
    status, text = evaluate(*tried)
    assert status == 0, text


def test_some_images_without_a_label_among_others(
    evaluate: Train, run_verb: Train, pretrained: Path, labelled: Path, shards: Path
) -> None:
    """As WebDataset shards can have them: refused by evaluations, and no test behind a pretraining."""
    common = ["--checkpoint", pretrained, "--output", "out", *CPU]
    for command in EVALUATIONS:
        refused(
            evaluate(*command, *common, "--train", shards), "labels are needed", "12 of 60 images"
        )
        refused(
            evaluate(*command, *common, "--train", labelled, "--test", shards / "val"),
            "labels are needed",
            "6 of 30",
        )
    picture = labelled / "val" / "class0" / "val_000.jpg"
    refused(
        evaluate("predict", *common, "--train", shards, picture),
        "labels are needed",
        "12 of 60 images",
    )
    said = evaluate("predict", *common, "--train", labelled, picture, picture.parent)
    refused(said, "is no file")
    assert "looking at" not in said[1]  # 50,000 images, before it is said
    assert not outputs()
    status, text = run_verb("train", "--data", shards, "--epochs", "1", *TINY)
    assert status == 0, text
    assert "has images without labels: no kNN test" in text


@pytest.fixture(scope="module")
def shards(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as WebDataset, every fifth without a label."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "part-0.tar", "w") as tar:
            for number, path in enumerate(sorted((labelled / split).rglob("*.jpg"))):
                for suffix, content in (
                    (".jpg", path.read_bytes()),
                    (".cls", path.parent.name[-1:].encode()),
                ):
                    if suffix == ".jpg" or number % 5:
                        info = tarfile.TarInfo(f"{number:04d}{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return root


def test_compare_tells_folders_of_one_name_apart_and_survives_others_files(
    evaluate: Train, pretrained: Path, labelled: Path
) -> None:
    for output, k in (("a/same", "1"), ("b/same", "60")):
        assert (
            evaluate(
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
            )[0]
            == 0
        )
    status, text = evaluate("compare", "a/same", "b/same", "a/same")
    assert status == 0, text
    assert text.split()[:3] == ["evaluation", "a/same", "b/same"]
    values = [
        json.loads(Path(name, "same/knn.json").read_text())["results"]["knn_top1"] for name in "ab"
    ]
    (line,) = [line for line in text.splitlines() if line.startswith("knn: knn_top1")]
    assert line.split()[2:] == [*(f"{value:.4g}" for value in values), "45.6"]
    Path("a/same/said.json").write_text('[{"image": "cat.jpg"}]')
    Path("a/same/summary.json").write_text("[1]")
    Path("a/same/svm.json").write_text(
        '{"evaluation": "svm", "results": 3, "published": 4, "differs": 5}'
    )
    Path("a/same/semisup.json").write_text('{"evaluation"')
    status, text = evaluate("compare", "a/same")
    assert status == 0, text
    assert [line.split(",")[0] for line in text.splitlines() if "damaged" in line] == [
        "left out a/same/semisup.json",
        "left out a/same/svm.json",
    ]


def test_an_image_that_cannot_be_read(evaluate: Train, pretrained: Path, labelled: Path) -> None:
    good = labelled / "val" / "class0" / "val_000.jpg"
    Path("bad.jpg").write_bytes(good.read_bytes()[:200])
    Path("text.txt").write_text("no image")
    for name in ("bad.jpg", "text.txt", "absent.jpg", "."):
        refused(
            evaluate("predict", "--checkpoint", pretrained, "--train", labelled, good, name, *CPU),
            name,
        )
    refused(evaluate("predict", "--checkpoint", pretrained, *CPU), "IMAGE")
    refused(evaluate("predict", "--checkpoint", pretrained, good, *CPU), "--train", "linear")


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
        ("semisup --labels nowhere.txt", "--labels nowhere.txt: neither a fraction nor a file"),
        ("semisup --labels 10%", "--labels 10%: neither a fraction nor a file"),
        ("semisup --batch-size 0", "--batch-size is 0"),
        ("knn --size 0", "--size is 0"),
        ("knn --threads 0", "--threads is 0"),
        ("svm --voc07 nowhere", "nowhere"),
    ],
)
def test_what_no_evaluation_can_be_made_of(
    evaluate: Train, pretrained: Path, labelled: Path, command: str, words: str
) -> None:
    rest = [] if command.startswith("svm") else ["--train", labelled]
    refused(
        evaluate(*command.split(), "--checkpoint", pretrained, "--output", "out", *rest, *CPU),
        words,
    )
    assert not outputs()


def test_without_a_demo_run_it_says_what_to_do(evaluate: Train) -> None:
    for command in ("knn", "linear", "semisup", "svm", "predict", "export"):
        refused(evaluate(command), "runs/demo", "train.py")
