"""The weights of a network in our names, their architecture, and building the network from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..backbone import BACKBONES, Backbone, build_backbone
from ..barlow_twins import build_projector
from .layouts import LAYOUTS


@dataclass(frozen=True)
class Weights:
    """The weights of a network in our names, on the CPU in float32, and facts about them.

    Attributes:
        layout: The layout of the file they were read from, a key of `LAYOUTS`.
        backbone: Entries with torchvision's names, without `fc`.
        projector: Entries with the names of `build_projector`; {} if there is none.
        head: "weight" [C, F] and "bias" [C] of a linear classifier; {} if there is none.
        classes: Names of the classifier's outputs; [] if the file does not contain them.
        size: Side of the views they were trained on, in pixels, if the file contains it.
        epochs: Epochs of their pretraining, if the file contains the number.
    """

    layout: str
    backbone: dict[str, Tensor]
    projector: dict[str, Tensor]
    head: dict[str, Tensor]
    classes: list[str]
    size: int | None
    epochs: int | None = None

    def entries(self) -> dict[str, Tensor]:
        """All entries by their full names, "backbone.conv1.weight"."""
        parts = {"backbone": self.backbone, "projector": self.projector, "head": self.head}
        return {
            f"{part}.{name}": value
            for part, entries in parts.items()
            for name, value in entries.items()
        }


class Architecture(NamedTuple):
    """The settings of `build_network` that follow from the names and shapes of weights."""

    backbone: str
    width: int
    small_stem: bool
    projector: str  # "" if there is none


def find_architecture(weights: Weights) -> Architecture | None:
    """The architecture of weights, or None if they are not those of a ResNet that we know."""
    name = _find_backbone(weights.backbone)
    stem = weights.backbone.get("conv1.weight")
    if name is None or stem is None or stem.ndim != 4:
        return None
    widths = {
        int(layer.split(".")[0]): len(weight)
        for layer, weight in weights.projector.items()
        if is_linear_weight(layer, weight)
    }
    return Architecture(
        backbone=name,
        width=len(stem),
        small_stem=stem.shape[-1] == 3,
        projector="-".join(str(widths[layer]) for layer in sorted(widths)),
    )


def _find_backbone(entries: Mapping[str, Tensor]) -> str | None:
    """The key of `BACKBONES` with this type and these numbers of blocks."""
    blocks = set()
    for name in entries:
        match = re.match(r"layer(\d+)\.\d+\.", name)
        if match:
            blocks.add((int(match[1]), match[0]))
    depths = [sum(stage == number for stage, _ in blocks) for number in range(1, 5)]
    block_type = Bottleneck if "layer1.0.conv3.weight" in entries else BasicBlock
    for name, known in BACKBONES.items():
        if known == (block_type, depths):
            return name
    return None


def is_linear_weight(name: str, value: Tensor) -> bool:
    """Whether an entry of a projector is the weight of a linear layer, like "3.weight"."""
    return value.ndim == 2 and re.fullmatch(r"\d+\.weight", name) is not None


def small_stem_padding(layout: str) -> int:
    """Padding of the small stem in pixels: 2 in solo-learn (solo/methods/base.py), 1 elsewhere."""
    return 2 if layout == "solo-learn" else 1


def load_backbone(weights: Weights, path: Path) -> Backbone:
    """Build the backbone of weights, in eval mode.

    Args:
        weights: The weights.
        path: The file they were read from, for error messages.

    Raises:
        ValueError: They are not a whole network, or not finite.
    """
    backbone = build_empty_backbone(weights, path)
    not_finite = [name for name, value in weights.backbone.items() if not value.isfinite().all()]
    if not_finite:
        raise ValueError(
            f"{path}: {len(not_finite)} of its tensors are not finite ({not_finite[0]}): use "
            "an earlier checkpoint"
        )
    entries = {name: value.clone() for name, value in weights.backbone.items()}
    backbone.load_state_dict(entries, assign=True)
    if backbone.conv1.kernel_size == (3, 3):
        padding = small_stem_padding(weights.layout)
        backbone.conv1.padding = (padding, padding)
    return backbone.eval()


def build_empty_backbone(weights: Weights, path: Path, unknown: Sequence[str] = ()) -> Backbone:
    """Build the backbone of weights without memory, and check that the weights fit.

    Args:
        weights: The weights.
        path: The file they were read from, for error messages.
        unknown: Names in the file that belong to no part of our network.

    Raises:
        ValueError: Entries are missing, unexpected, or have another shape. The message has their
            names as they are in the file.
    """
    architecture = find_architecture(weights)
    if architecture is None:
        raise ValueError(_describe_unknown_network(path, [*weights.backbone, *unknown]))

    with torch.device("meta"):
        backbone = build_backbone(
            architecture.backbone, architecture.width, architecture.small_stem
        )
        modules: dict[str, nn.Module] = {"backbone": backbone}
        if architecture.projector:
            modules["projector"] = build_projector(backbone.out_features, architecture.projector)
        if weights.head:
            first_entry = next(iter(weights.head.values()))
            outputs = first_entry.shape[0] if first_entry.ndim else 1
            modules["head"] = nn.Linear(backbone.out_features, outputs)

    expected = nn.ModuleDict(modules).state_dict()
    problems = _describe_mismatch(weights, expected, unknown)
    if problems:
        raise ValueError(
            f"{path} does not contain a whole {architecture.backbone} in the layout of "
            f"{weights.layout}: {problems}"
        )
    return backbone


def _describe_unknown_network(path: Path, names: Sequence[str]) -> str:
    message = f"{path} contains no ResNet that twinfeed knows ({', '.join(BACKBONES)})"
    if names:
        return f"{message}: its entries are {', '.join(names[:3])}, ..."
    return f"{message}; it contains no state_dict: save model.state_dict()"


def _describe_mismatch(
    weights: Weights, expected: Mapping[str, Tensor], unknown: Sequence[str]
) -> str:
    """How the entries of weights differ from those of a network; "" if they do not."""
    layout = LAYOUTS[weights.layout]
    entries = weights.entries()
    missing = [str(layout.to_their_name(name)) for name in expected if name not in entries]
    unexpected = [str(layout.to_their_name(name)) for name in entries if name not in expected]
    misshapen = [
        f"{layout.to_their_name(name)} {list(entries[name].shape)} for {list(value.shape)}"
        for name, value in expected.items()
        if name in entries and entries[name].shape != value.shape
    ]
    differences = [
        _count_and_name("missing", missing),
        _count_and_name("unexpected", [*unknown, *unexpected]),
        _count_and_name("misshapen", misshapen),
    ]
    return "; ".join(filter(None, differences))


def _count_and_name(adjective: str, names: Sequence[str]) -> str:
    """ "10 missing (conv1.weight, bn1.weight, bn1.bias, ...)"; "" for no names."""
    if not names:
        return ""
    listed = ", ".join(names[:3])
    if len(names) > 3:
        listed += ", ..."
    return f"{len(names)} {adjective} ({listed})"
