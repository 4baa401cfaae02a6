"""Weights that are refused: entries that do not fit, and other networks than our ResNets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from model import read_weights
from tests.helpers.libraries import import_or_skip
from tests.helpers.project_networks import mmpretrain, resnet18, solo_learn, state


def check_refused(path: Path, content: Any, *words: str) -> None:
    """With one line that has the path and these words."""
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_missing_entries_are_counted_and_named(tmp_path: Path) -> None:
    entries = state(resnet18())
    incomplete = {n: v for n, v in entries.items() if not n.startswith("layer3.1.bn")}
    words = ["resnet18", "torchvision", "10 missing (layer3.1.bn1.", ", ...)"]
    check_refused(tmp_path / "x.pth", incomplete, *words)
    without_bias = entries | {"fc.weight": torch.zeros(5, 512)}
    check_refused(tmp_path / "x.pth", without_bias, "1 missing (fc.bias)")


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"layer1.0.se.fc1.weight": torch.zeros(3)}, "1 unexpected (layer1.0.se.fc1.weight)"),
        ({"bn1.bias": torch.zeros(3)}, "1 misshapen (bn1.bias [3] for [64])"),
        ({"extra": "text"}, "1 unexpected (extra)"),
        (
            {"fc.weight": torch.zeros(5, 100), "fc.bias": torch.zeros(5)},
            "fc.weight [5, 100] for [5, 512]",
        ),
        (
            {"fc.weight": torch.tensor(1.0), "fc.bias": torch.zeros(5)},
            "fc.weight [] for [1, 512]",
        ),
    ],
    ids=["unexpected", "misshapen", "not a tensor", "narrow classifier", "scalar classifier"],
)
def test_entries_that_do_not_fit_are_named(
    added: dict[str, Any], words: str, tmp_path: Path
) -> None:
    check_refused(tmp_path / "x.pth", state(resnet18()) | added, words)


def test_entries_are_named_as_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    entries = state(mmpretrain())
    too_many = {"state_dict": entries | {"neck.fc3.bias": torch.zeros(3)}}
    check_refused(path, too_many, "1 unexpected (neck.fc3.bias)")
    del entries["neck.bn1.weight"]
    check_refused(path, {"state_dict": entries}, "mmpretrain", "1 missing (neck.bn1.weight)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("projector.0.bias", torch.zeros(3)),  # of another shape than the outputs
        ("encoder.bn1.bias", torch.zeros(64)),  # which is also there as backbone.bn1.bias
        ("queue", torch.zeros(2)),
    ],
)
def test_entries_of_solo_learn_that_do_not_fit_are_named(
    name: str, value: Tensor, tmp_path: Path
) -> None:
    entries = state(solo_learn()) | {name: value}
    words = ["solo-learn", f"1 unexpected ({name})"]
    check_refused(tmp_path / "x.pth", {"state_dict": entries}, *words)


NOT_OURS = "contains no ResNet that twinfeed knows (resnet18, resnet34, resnet50, resnet101)"
OTHER_NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit": (torchvision.models.vit_b_16, NOT_OURS),
    "resnet152": (torchvision.models.resnet152, NOT_OURS),
    "deep stem": (lambda: import_or_skip("timm").create_model("resnet18d"), NOT_OURS),
    "wide": (torchvision.models.wide_resnet50_2, "resnet50"),
    "next": (torchvision.models.resnext50_32x4d, "resnet50"),
    "squeeze": (
        lambda: import_or_skip("timm").create_model("seresnet50"),
        "unexpected (layer1.0.se.fc1.weight",
    ),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_networks_are_refused(name: str, tmp_path: Path) -> None:
    make, words = OTHER_NETWORKS[name]
    with torch.device("meta"):
        module = make()
    small_on_disk = {
        name: torch.empty((), dtype=value.dtype).expand(value.shape)
        for name, value in module.state_dict().items()
    }
    check_refused(tmp_path / "x.pth", small_on_disk, words)
    if name in ("wide", "next"):
        check_refused(tmp_path / "x.pth", small_on_disk, "misshapen (layer1.0.conv")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], nn.Linear(2, 2)])
def test_a_file_without_named_weights_is_refused(content: Any, tmp_path: Path) -> None:
    check_refused(tmp_path / "x.pth", content, "contains no state_dict")


def test_a_file_that_contains_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    check_refused(tmp_path / "x.pth", content, "its entries are model")
