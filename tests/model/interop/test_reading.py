"""Reading weights from files of all layouts: the network computes what the project's own does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from model import (
    BACKBONES,
    BarlowTwins,
    build_backbone,
    export,
    export_backbone,
    load_backbone,
    read_weights,
    save_checkpoint,
)
from model.barlow_twins import build_projector
from tests.helpers import project_networks as projects
from tests.helpers.project_networks import (
    FEATURES,
    IMAGES,
    ProjectNetwork,
    assert_same_entries,
    randomize_for_eval,
    resnet18,
    state,
)


def without_counts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if "num_batches" not in name}


class ProjectFile(NamedTuple):
    layout: str
    make: Callable[[], ProjectNetwork]
    content: Callable[[ProjectNetwork], Any]


def vissl_content(network: ProjectNetwork) -> dict[str, Any]:
    model = {"trunk": without_counts(state(network.trunk)), "heads": {}}
    return {"classy_state_dict": {"base_model": {"model": model}}}


def timm_content(network: ProjectNetwork) -> dict[str, Any]:
    return state(network.network) | state(network.head, "fc.")


def lightning_content(network: ProjectNetwork) -> dict[str, Any]:
    return {"state_dict": state(network)}


FILES = {
    "resnet50.pth": ProjectFile(
        "torchvision", projects.torchvision_resnet, lambda m: state(m.network)
    ),
    "checkpoint.pth": ProjectFile(
        "barlowtwins",
        projects.authors,
        lambda m: {"epoch": 3, "model": state(m, "module."), "optimizer": {}},
    ),
    "mmpretrain": ProjectFile(
        "mmpretrain", projects.mmpretrain, lambda m: {"meta": {}, "state_dict": state(m)}
    ),
    "mmpretrain linear": ProjectFile(
        "mmpretrain",
        projects.mmpretrain_linear,
        lambda m: {"meta": {"dataset_meta": {"classes": tuple("abcde")}}, "state_dict": state(m)},
    ),
    "solo-learn": ProjectFile(
        "solo-learn", projects.solo_learn, lambda m: {"state_dict": state(m), "epoch": 99}
    ),
    "solo-learn, old": ProjectFile("solo-learn", projects.solo_learn_old, lightning_content),
    "solo-learn, momentum": ProjectFile(
        "solo-learn", projects.solo_learn_momentum, lightning_content
    ),
    "lightly": ProjectFile("lightly", projects.lightly, lightning_content),
    "lightly, compiled": ProjectFile(
        "lightly", projects.lightly, lambda m: {"state_dict": state(m, "_orig_mod.module.")}
    ),
    "lightly, sequential": ProjectFile("lightly", projects.lightly_sequential, state),
    "lightly, linear": ProjectFile("lightly", projects.lightly_linear, lightning_content),
    "VISSL": ProjectFile("vissl", projects.vissl, vissl_content),
    "timm": ProjectFile("torchvision", projects.timm, timm_content),
}


def check_weights_compute_the_same(path: Path, network: ProjectNetwork) -> None:
    """Features, embeddings (up to the last bias, which the loss cancels) and scores."""
    weights = read_weights(path)
    features = network.compute_features(IMAGES)
    torch.testing.assert_close(load_backbone(weights, path)(IMAGES), features)

    projector = network.get_projector()
    assert bool(weights.projector) == (projector is not None)
    if projector is not None:
        linear = [m for m in projector.modules() if isinstance(m, nn.Linear)]
        widths = "-".join(str(layer.out_features) for layer in linear)
        ours = build_projector(FEATURES, widths).eval()
        ours.load_state_dict(weights.projector)
        last_bias = 0 if linear[-1].bias is None else linear[-1].bias
        torch.testing.assert_close(ours(features), projector(features) - last_bias)

    classifier = network.get_classifier()
    assert bool(weights.head) == (classifier is not None)
    if classifier is not None:
        scores = nn.functional.linear(features, weights.head["weight"], weights.head["bias"])
        torch.testing.assert_close(scores, classifier(features))


@pytest.mark.parametrize("name", FILES)
def test_weights_from_a_torch_file_compute_what_the_projects_network_does(
    name: str, tmp_path: Path
) -> None:
    file = FILES[name]
    network = randomize_for_eval(file.make())
    torch.save(file.content(network), tmp_path / "file")
    weights = read_weights(tmp_path / "file")
    assert weights.layout == file.layout
    assert weights.classes == (list("abcde") if name == "mmpretrain linear" else [])
    with torch.no_grad():
        check_weights_compute_the_same(tmp_path / "file", network)


@pytest.mark.parametrize("name", ["checkpoint.pth", "VISSL", "timm"])
def test_weights_from_safetensors_compute_what_the_projects_network_does(
    name: str, tmp_path: Path
) -> None:
    file = FILES[name]
    network = randomize_for_eval(file.make())
    content = file.content(network)
    for wrapper in ("model", "classy_state_dict", "base_model", "model", "trunk"):
        content = content.get(wrapper, content)
    safetensors.torch.save_file(content, tmp_path / "file")
    weights = read_weights(tmp_path / "file")
    assert (weights.layout, weights.classes) == (file.layout, [])
    with torch.no_grad():
        check_weights_compute_the_same(tmp_path / "file", network)


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_architecture_is_found_from_names_and_shapes(
    name: str, small_stem: bool, tmp_path: Path
) -> None:
    backbone = randomize_for_eval(build_backbone(name, 4, small_stem))
    path = export_backbone(backbone, tmp_path, size=32)
    for file in (path, tmp_path / "backbone.pth"):
        weights = read_weights(file)
        assert weights.size == (32 if file == path else None)
        assert torch.equal(load_backbone(weights, file)(IMAGES), backbone(IMAGES))
    assert_same_entries(read_weights(path).backbone, backbone.state_dict())


def test_our_runs_are_read_from_their_folder_or_their_file(tmp_path: Path) -> None:
    network = randomize_for_eval(BarlowTwins(build_backbone("resnet50", 4), "16-16", 0.005))
    settings = {"size": 40, "backbone": "resnet50"}
    state = {"step": 3, "model": network.state_dict(), "settings": settings}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        weights = read_weights(path)
        assert (weights.layout, weights.size, weights.head) == ("twinfeed", 40, {})
        assert_same_entries(weights.backbone, network.backbone.state_dict())
        assert_same_entries(weights.projector, network.projector.state_dict())


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    torch.save(resnet18().half().state_dict(), tmp_path / "x")
    dtypes = {value.dtype for value in read_weights(tmp_path / "x").backbone.values()}
    assert dtypes == {torch.float32, torch.int64}


# ── facts about the weights ──────────────────────────────────────────────────────────────────────


def test_class_names_without_a_classifier_are_ignored(tmp_path: Path) -> None:
    """mmpretrain's pretraining checkpoints have the classes of the data."""
    meta = {"dataset_meta": {"classes": list("abc")}}
    torch.save({"meta": meta, "state_dict": state(projects.mmpretrain())}, tmp_path / "x")
    assert read_weights(tmp_path / "x").classes == []


@pytest.mark.parametrize(
    "facts",
    [
        {"settings": "text", "meta": 3},
        {"settings": {"size": "x"}, "meta": {"CLASSES": 3}},
        {"__metadata__": {"twinfeed": 3}},
    ],
)
def test_facts_of_unexpected_types_are_ignored(facts: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": state(resnet18()), **facts}, tmp_path / "x")
    weights = read_weights(tmp_path / "x")
    assert (weights.size, weights.classes) == (None, [])


@pytest.mark.parametrize("facts", [[1], {"layout": "unknown", "size": [], "classes": "abc"}])
def test_metadata_of_unexpected_types_is_ignored(facts: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file(state(resnet18()), path, {"twinfeed": json.dumps(facts)})
    weights = read_weights(path)
    assert (weights.layout, weights.size, weights.classes) == ("torchvision", None, [])


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file(state(resnet18()), path, {"twinfeed": "{"})
    with pytest.raises(ValueError, match=f"{path}.*JSON"):
        read_weights(path)


def test_pretraining_epochs_are_read_if_a_file_has_them(tmp_path: Path) -> None:
    """The authors' files have the number of finished epochs, ours the number of finished steps."""
    authors = {"epoch": 7, "model": state(projects.authors(), "module."), "optimizer": {}}
    model = state(resnet18(), "backbone.")
    settings = {"images": 1000, "batch_size": 300, "epochs": 99, "size": 48}
    odd_settings = {"images": 3, "batch_size": "x"}
    files: dict[str, tuple[dict[str, Any], int | None]] = {
        "authors.pth": (authors, 7),
        "ours.pt": ({"step": 14, "settings": settings, "model": model}, 4),
        "odd.pt": ({"step": 14, "settings": odd_settings, "model": model}, None),
        "plain.pth": (state(resnet18()), None),
    }
    for name, (content, epochs) in files.items():
        torch.save(content, tmp_path / name)
        assert read_weights(tmp_path / name).epochs == epochs, name

    export(read_weights(tmp_path / "ours.pt"), "safetensors", tmp_path / "ours.safetensors")
    assert read_weights(tmp_path / "ours.safetensors").epochs == 4
