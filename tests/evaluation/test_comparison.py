"""`evaluate.py compare`: the results of several runs in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import CPU, Command, assert_refused


def write_knn(evaluate: Command, pretrained: Path, labelled: Path, output: str, k: int) -> str:
    """Evaluate kNN with results in `output`; returns the top-1 accuracy as the table shows it."""
    options = ["--checkpoint", pretrained, "--train", labelled, "--output", output, "--k", k]
    status, text = evaluate("knn", *options, *CPU)
    assert status == 0, text
    record = json.loads(Path(output, "knn.json").read_text())
    return f"{record['results']['knn_top1']:.4g}"


def row_of(text: str, name: str) -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(name)]
    return row


def test_runs_are_shown_side_by_side(evaluate: Command, pretrained: Path, labelled: Path) -> None:
    one = write_knn(evaluate, pretrained, labelled, "one", k=1)
    other = write_knn(evaluate, pretrained, labelled, "other", k=7)
    status, text = evaluate("compare", "one", "other", pretrained)
    assert status == 0, text
    assert row_of(text, "knn: knn_top1").split()[2:6] == [one, other, "-", "45.6"]
    assert "after pretraining: knn_top1" in text


def test_folders_of_the_same_name_are_told_apart(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    first = write_knn(evaluate, pretrained, labelled, "a/same", k=1)
    second = write_knn(evaluate, pretrained, labelled, "b/same", k=60)
    status, text = evaluate("compare", "a/same", "b/same", "a/same")
    assert status == 0, text
    assert text.split()[:3] == ["evaluation", "a/same", "b/same"]
    assert row_of(text, "knn: knn_top1").split()[2:] == [first, second, "45.6"]


def test_a_folder_named_like_a_path_of_another_is_told_apart(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    write_knn(evaluate, pretrained, labelled, "one", k=1)
    shutil.copytree("one", "again/one")
    status, text = evaluate("compare", "one", "again/one")
    assert status == 0, text
    assert text.splitlines()[0].split()[:3] == ["evaluation", "one", "again/one"]


def test_damaged_files_are_named_and_other_json_is_ignored(
    evaluate: Command, pretrained: Path, labelled: Path
) -> None:
    write_knn(evaluate, pretrained, labelled, "run", k=1)
    Path("run/predictions.json").write_text('[{"image": "cat.jpg"}]')
    Path("run/summary.json").write_text("[1]")
    damaged = {"evaluation": "svm", "results": 3, "published": 4, "differs": 5}
    Path("run/svm.json").write_text(json.dumps(damaged))
    Path("run/semisup.json").write_text('{"evaluation"')
    status, text = evaluate("compare", "run")
    assert status == 0, text
    lines = [line.partition(",")[0] for line in text.splitlines() if "damaged" in line]
    assert lines == ["left out run/semisup.json", "left out run/svm.json"]


@pytest.mark.parametrize(("name", "words"), [("empty", "holds no results"), ("absent", "folder")])
def test_a_folder_without_results_is_refused(evaluate: Command, name: str, words: str) -> None:
    Path("empty").mkdir()
    assert_refused(evaluate("compare", name), name, words)
