"""Importing the package loads nothing heavy, and every public name can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import evaluation

ROOT = Path(__file__).parents[2]


def loaded_modules(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after running `code`."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


def test_the_command_line_is_parsed_without_torch() -> None:
    code = "import evaluate; from evaluation import command_options; command_options.parse(['knn'])"
    loaded = loaded_modules(code)
    assert "evaluation.command_options" in loaded
    assert not loaded & {"torch", "pipeline", "model", "sklearn"}


def test_scikit_learn_is_loaded_only_for_svms() -> None:
    code = "from evaluation import load_classifier, knn_accuracy, train_classifiers"
    loaded = loaded_modules(code)
    assert "torch" in loaded
    assert "sklearn" not in loaded
    assert "sklearn" in loaded_modules("from evaluation import svm_map")


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(evaluation, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute unknown"):
        _ = evaluation.unknown
