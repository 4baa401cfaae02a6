"""What train.py writes and prints, and how it treats the folder of an earlier run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import evaluation
import model
import pipeline
from experiment.metrics import read_metrics
from experiment.run_folder import claim
from tests.helpers.runs import (
    SUMMARY,
    TINY,
    Command,
    assert_refused,
    logged_steps,
    read_summary,
    same_weights,
    saved_step,
)

KNN_SCORES = [name for name in SUMMARY if name.startswith("knn")]


def test_a_dry_run_leaves_nothing_behind(
    train: Command, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cwd"))
    files_before = sorted(unlabelled.rglob("*"))
    status, text = train("--data", unlabelled, *TINY, "--dry-run")
    assert status == 0, text
    assert re.search(r"peak memory +\d+\.\d GB *\n", text)
    assert re.search(r"largest batch +all 40 images in one step would fit *\n", text)
    assert re.search(r"the whole run +about \d+ min on cpu, \d+ cores", text)
    assert list(Path.cwd().iterdir()) == []
    assert sorted(unlabelled.rglob("*")) == files_before


def test_a_run_on_labelled_images_writes_its_files_and_a_summary_with_knn_scores(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*TINY, "--epochs", "2", "--log-steps", "5", "--run-folder", run]
    status, text = train("--data", photos, *options)
    assert status == 0, text
    assert "decoder cpu (no GPU) with" in text

    summary = read_summary(run)
    assert list(summary) == SUMMARY
    assert summary["preset"] == "demo"
    assert summary["backbone"] == "resnet18"
    assert summary["decoder"] == "cpu"
    assert all(0 <= summary[name] <= 100 for name in KNN_SCORES)
    assert summary["steps"] == 2 * (54 // 8), "a tenth of the 60 images is held out"
    assert summary["images_per_s"] > 0
    assert 0 <= summary["data_wait_fraction"] < 1

    metrics = read_metrics(run / "metrics.jsonl")
    assert logged_steps(run) == [0, 5, 10, 11]
    assert summary["loss_first"] == metrics[0]["loss"]
    assert summary["loss_last"] == metrics[-1]["loss"]

    assert summary["checkpoint"] == str(run / "checkpoint.pt")
    assert saved_step(run) == summary["steps"]
    assert summary["export"] == str(run / "backbone.safetensors")
    exported = model.build_backbone("resnet18", 8)
    exported.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))

    files = {
        *(".lock", "backbone.pth", "backbone.safetensors", "checkpoint.pt", "config.json"),
        *("correlation", "environment.json", "metrics.jsonl", "summary.json", "views.png"),
    }
    if importlib.util.find_spec("tensorboard"):
        files.add("tensorboard")
    assert {path.name for path in run.iterdir()} == files
    assert list(Path.cwd().iterdir()) == []


def test_the_knn_scores_are_those_of_the_exported_weights(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = tmp_path / "data"
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        split = "train" if i % 2 == 0 else "val"
        target = data / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    options = [*TINY, "--epochs", "4", "--lr", "6", "--run-folder", run]
    status, text = train("--data", data, *options)
    assert status == 0, text
    images = json.loads((run / "config.json").read_text())["images"]
    assert images == 30, "val/ is neither trained on nor a class"

    backbone = model.build_backbone("resnet18", 8).eval()
    backbone.load_state_dict(torch.load(run / "backbone.pth", weights_only=True))
    view = pipeline.center_view(16)
    loader_options = pipeline.LoaderOptions(batch_size=7, shuffle=False)
    bank, queries = (
        pipeline.open_loader(pipeline.open_store(data / split), view, loader_options).epoch(0)
        for split in ("train", "val")
    )
    features = {"trained": backbone, "pixels": evaluation.pixel_feature}
    expected = evaluation.knn_accuracies(bank, queries, features)
    summary = read_summary(run)
    assert summary["knn_top1_trained"] == pytest.approx(expected["trained"])
    assert summary["knn_top1_pixels"] == pytest.approx(expected["pixels"])


def test_images_without_labels_are_trained_on_without_scores(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    options = [*TINY, "--epochs", "1", "--run-folder", tmp_path / "run"]
    status, text = train("--data", unlabelled, *options)
    assert status == 0, text
    summary = read_summary(tmp_path / "run")
    assert [summary[name] for name in KNN_SCORES] == [None] * 4


def test_an_earlier_run_in_the_folder_is_renamed(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for i, earlier in enumerate((None, "run.1", "run.2")):
        options = [*TINY, "--epochs", "1", "--run-folder", run]
        status, text = train("--data", unlabelled, *options)
        assert status == 0, text
        if earlier is not None:
            assert str(tmp_path / earlier) in text
            assert (tmp_path / earlier / "note").read_text() == f"run {i - 1}"
            assert read_summary(tmp_path / earlier)["checkpoint"] == str(run / "checkpoint.pt")
        (run / "note").write_text(f"run {i}")


def test_old_names_of_options_still_work(train: Command, unlabelled: Path, tmp_path: Path) -> None:
    """`--run` is now `--run-folder`, and the decoder `torchvision` is now `cpu`."""
    options = ["--data", unlabelled, *TINY, "--epochs", "1"]
    status, text = train(*options, "--run-folder", tmp_path / "new", "--decoder", "cpu")
    assert status == 0, text
    status, text = train(*options, "--run", tmp_path / "old", "--decoder", "torchvision")
    assert status == 0, text
    assert "decoder cpu (as requested)" in text
    assert read_summary(tmp_path / "old")["decoder"] == "cpu"
    assert same_weights(tmp_path / "old", tmp_path / "new")


def test_two_runs_cannot_share_a_folder(train: Command, unlabelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", unlabelled, *TINY, "--run-folder", run, "--epochs", "1")
    assert train(*options)[0] == 0
    with claim(run):
        for arguments in (options, (*options, "--resume")):
            status, text = train(*arguments)
            assert status == 1
            assert f"another run is still using {run}" in text
    assert (run / "summary.json").exists()
    assert not (tmp_path / "run.1").exists()


def test_a_folder_that_is_not_of_a_run_is_left_alone(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for path, words in (
        (folder, "contains files that are not those of a run"),
        (folder / "thesis.tex", "is a file"),
    ):
        status, text = train("--data", unlabelled, *TINY, "--run-folder", path)
        assert status == 1
        assert words in text
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_run_folder_that_cannot_be_written_is_named(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for run in (file / "run", file):
        assert_refused(train("--data", unlabelled, *TINY, "--run-folder", run), str(file))
    assert file.read_text() == "precious"
