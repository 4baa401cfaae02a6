"""Exported weights load into the network of the other project and compute the same."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from model import (
    EXPORTS,
    BarlowTwins,
    Weights,
    build_backbone,
    export,
    export_backbone,
    load_backbone,
    read_weights,
)
from model.barlow_twins import build_projector
from tests.helpers import project_networks as projects
from tests.helpers.libraries import import_or_skip
from tests.helpers.networks import randomize
from tests.helpers.project_networks import (
    CLASSES,
    FEATURES,
    IMAGES,
    Detectron2ResNet18,
    ProjectNetwork,
    assert_same_entries,
    randomize_for_eval,
    state,
)

WIDTHS = (20, 20, 16)
PROJECTOR = "20-20-16"
WITHOUT_PROJECTOR = ("torchvision", "timm", "safetensors")


@pytest.fixture(scope="module")
def weights() -> Weights:
    network = randomize_for_eval(BarlowTwins(build_backbone("resnet18"), PROJECTOR, 0.005))
    return Weights(
        layout="twinfeed",
        backbone=network.backbone.state_dict(),
        projector=network.projector.state_dict(),
        head={"weight": torch.randn(CLASSES, FEATURES), "bias": torch.randn(CLASSES)},
        classes=list("vwxyz"),
        size=48,
    )


def compute_features(weights: Weights) -> Tensor:
    return load_backbone(weights, Path("weights"))(IMAGES)


def compute_embeddings(weights: Weights) -> Tensor:
    projector = build_projector(FEATURES, PROJECTOR).eval()
    projector.load_state_dict(weights.projector)
    return projector(compute_features(weights))


def compute_scores(weights: Weights) -> Tensor:
    return compute_features(weights) @ weights.head["weight"].T + weights.head["bias"]


@pytest.mark.parametrize("layout", EXPORTS)
def test_exported_weights_are_read_again(layout: str, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    export(weights, layout, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if layout == "detectron2":  # a plain pickle, which only detectron2 reads
        return
    again = read_weights(path)
    assert_same_entries(again.backbone, weights.backbone)
    assert_same_entries(again.projector, {} if layout in WITHOUT_PROJECTOR else weights.projector)
    assert_same_entries(again.head, weights.head)
    has_classes = layout in ("safetensors", "mmpretrain")
    assert again.classes == (weights.classes if has_classes else [])
    assert again.size == (weights.size if layout == "safetensors" else None)


@pytest.mark.parametrize("layout", WITHOUT_PROJECTOR)
def test_an_export_loads_into_torchvision_and_timm(
    layout: str, weights: Weights, tmp_path: Path
) -> None:
    export(weights, layout, tmp_path / "file")
    if layout == "timm":
        network = import_or_skip("timm").create_model("resnet18", num_classes=CLASSES)
    else:
        network = torchvision.models.resnet18(num_classes=CLASSES)
    if layout == "safetensors":
        entries = safetensors.torch.load_file(tmp_path / "file")
    else:
        entries = torch.load(tmp_path / "file", weights_only=True)
    network.load_state_dict(entries)
    torch.testing.assert_close(network.eval()(IMAGES), compute_scores(weights))


def test_an_export_loads_into_detectron2(weights: Weights, tmp_path: Path) -> None:
    export(weights, "detectron2", tmp_path / "weights.pkl")
    content = pickle.loads((tmp_path / "weights.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    network = Detectron2ResNet18()
    network.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in content["model"].items()}
    )
    torch.testing.assert_close(network.eval()(IMAGES), compute_features(weights))


def read_content(weights: Weights, layout: str, path: Path) -> dict[str, Any]:
    export(weights, layout, path)
    return torch.load(path, weights_only=True)


def check_computes_the_same(network: ProjectNetwork, weights: Weights) -> None:
    network.eval()
    features = network.compute_features(IMAGES)
    torch.testing.assert_close(features, compute_features(weights))
    projector, classifier = network.get_projector(), network.get_classifier()
    if projector is not None:
        torch.testing.assert_close(projector(features), compute_embeddings(weights))
    if classifier is not None:
        torch.testing.assert_close(classifier(features), compute_scores(weights))


def test_an_export_loads_into_solo_learn(weights: Weights, tmp_path: Path) -> None:
    network = projects.solo_learn(widths=WIDTHS)
    network.load_state_dict(read_content(weights, "solo-learn", tmp_path / "x")["state_dict"])
    check_computes_the_same(network, weights)


def test_an_export_loads_into_lightly(weights: Weights, tmp_path: Path) -> None:
    network = projects.lightly()
    network.load_state_dict(read_content(weights, "lightly", tmp_path / "x")["state_dict"])
    check_computes_the_same(network, weights)


def test_an_export_loads_into_the_two_networks_of_mmpretrain(
    weights: Weights, tmp_path: Path
) -> None:
    """mmpretrain has projector and classifier in different networks, with a file for each."""
    content = read_content(weights, "mmpretrain", tmp_path / "x")
    assert content["meta"] == {"dataset_meta": {"classes": weights.classes}}
    entries = content["state_dict"]

    linear = projects.mmpretrain_linear()
    linear.load_state_dict({k: v for k, v in entries.items() if not k.startswith("neck.")})
    check_computes_the_same(linear, weights)

    pretraining = projects.mmpretrain(WIDTHS)
    missing, unexpected = pretraining.load_state_dict(entries, strict=False)
    assert {name.rpartition(".")[0] for name in missing} == {"head.bn", "data_preprocessor"}
    assert unexpected == ["head.fc.weight", "head.fc.bias"]
    check_computes_the_same(pretraining, weights)


def test_a_resnet50_of_timm_survives_a_round_trip(tmp_path: Path) -> None:
    network = randomize_for_eval(import_or_skip("timm").create_model("resnet50", num_classes=3))
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    weights = read_weights(tmp_path / "timm.pth")
    scores = nn.functional.linear(compute_features(weights), **weights.head)
    torch.testing.assert_close(scores, network(IMAGES))
    export(weights, "timm", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same_entries(again, network.state_dict())


def test_a_resnet50_has_the_names_of_detectron2(tmp_path: Path) -> None:
    """Those of its R-50.pkl."""
    backbone = randomize(build_backbone("resnet50")).state_dict()
    weights = Weights("twinfeed", backbone, {}, {}, [], None)
    export(weights, "detectron2", tmp_path / "R-50.pkl")
    entries = pickle.loads((tmp_path / "R-50.pkl").read_bytes())["model"]
    assert len(entries) == len(backbone) == 318
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.norm.weight": "layer1.0.bn1.weight",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res5.2.conv3.weight": "layer4.2.conv3.weight",
        "res5.2.conv3.norm.running_mean": "layer4.2.bn3.running_mean",
    }.items():
        np.testing.assert_array_equal(entries[theirs], backbone[ours])


def test_an_exported_backbone_loads_into_torchvision(tmp_path: Path) -> None:
    backbone = randomize(build_backbone("resnet18")).to(memory_format=torch.channels_last)
    path = export_backbone(backbone, tmp_path)
    assert path == tmp_path / "backbone.safetensors"
    for entries in (
        safetensors.torch.load_file(path),
        torch.load(tmp_path / "backbone.pth", weights_only=True),
    ):
        network = torchvision.models.resnet18(weights=None)
        network.fc = nn.Identity()
        network.load_state_dict(entries)
        assert_same_entries(network.state_dict(), backbone.state_dict())
        assert all(value.is_contiguous() for value in entries.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.pth", "backbone.safetensors"]


# ── small stem ───────────────────────────────────────────────────────────────────────────────────


def test_the_wider_padding_of_solo_learns_small_stem_is_kept(tmp_path: Path) -> None:
    network = projects.solo_learn()
    network.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    network.backbone.maxpool = nn.Identity()
    randomize_for_eval(network)
    torch.save({"state_dict": state(network)}, tmp_path / "x.ckpt")
    weights = read_weights(tmp_path / "x.ckpt")
    export(weights, "safetensors", tmp_path / "x.safetensors")
    export(weights, "solo-learn", tmp_path / "y.ckpt")
    images = IMAGES[..., :32, :32]
    for path in (tmp_path / "x.ckpt", tmp_path / "x.safetensors", tmp_path / "y.ckpt"):
        ours = load_backbone(read_weights(path), path)
        torch.testing.assert_close(ours(images), network.backbone(images))
    with pytest.raises(ValueError, match=r"pads by 2 pixels.*export them to safetensors"):
        export(weights, "torchvision", tmp_path / "z.pth")


def test_our_small_stem_is_exported_only_to_layouts_with_its_padding(tmp_path: Path) -> None:
    backbone = build_backbone("resnet18", 8, small_stem=True).state_dict()
    weights = Weights("twinfeed", backbone, {}, {}, [], 32)
    with pytest.raises(ValueError, match="pads by 2 pixels"):
        export(weights, "solo-learn", tmp_path / "z.pth")
    export(weights, "lightly", tmp_path / "z.pth")
    assert load_backbone(read_weights(tmp_path / "z.pth"), tmp_path).conv1.padding == (1, 1)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_export_leaves_no_file(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layout 'caffe'.*torchvision, timm"):
        export(weights, "caffe", tmp_path / "x")
    with pytest.raises(ValueError, match=r"ends with \.pkl"):
        export(weights, "detectron2", tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())
