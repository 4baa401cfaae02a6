"""The table of layouts: how each project names the entries of a network in its files.

An entry is "part.name" in our names: `backbone.` with torchvision's names, `projector.` with those
of `build_projector` ("0.weight", "1.running_mean", ...), and `head.` with "weight" and "bias".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How one project names the entries of its files.

    Attributes:
        prefixes: Beginnings of their names, each with the beginning of our name that replaces it.
            If several map to the same one of ours, the first is used for writing.
        signature: A regular expression. A file has this layout only if the name of an entry begins
            with a match. None if the layout cannot be recognised by names (it has the same names as
            another one, or is only written).
        ignored: A regular expression. Entries whose names begin with a match are left out, because
            no part of our network computes with them.
        linear_biases: How many linear layers of the projector have a bias, counted from the last
            one. (We have none: batch normalisation and the loss cancel them.)
    """

    prefixes: dict[str, str]
    signature: str | None = None
    ignored: str | None = None
    linear_biases: int = 0

    def to_our_name(self, name: str) -> str | None:
        """Our name of an entry, "backbone.conv1.weight"; None if our network has no such part."""
        matching = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        if not matching:
            return None
        longest = max(matching, key=len)
        return self.prefixes[longest] + name.removeprefix(longest)

    def to_their_name(self, name: str) -> str | None:
        """Their name of an entry; None if the layout has no place for it."""
        for prefix, our_prefix in self.prefixes.items():
            if name.startswith(our_prefix):
                return prefix + name.removeprefix(our_prefix)
        return None

    def is_ignored(self, name: str) -> bool:
        """Whether an entry is left out."""
        return self.ignored is not None and re.match(self.ignored, name) is not None


ALL_LINEAR_LAYERS = 99

_TORCHVISION_PREFIXES = {"fc.": "head.", "": "backbone."}


def _lightly_prefixes() -> dict[str, str]:
    pretraining = {
        "backbone.": "backbone.",
        "projection_head.layers.": "projector.",
        # Their examples build the backbone as nn.Sequential(*list(resnet.children())[:-1]).
        "backbone.0.": "backbone.conv1.",
        "backbone.1.": "backbone.bn1.",
        "backbone.4.": "backbone.layer1.",
        "backbone.5.": "backbone.layer2.",
        "backbone.6.": "backbone.layer3.",
        "backbone.7.": "backbone.layer4.",
    }
    # A linear classifier that was trained afterwards contains the pretrained network as `model`.
    in_classifier = {f"model.{theirs}": ours for theirs, ours in pretraining.items()}
    heads = {"online_classifier.classification_head.": "head.", "classification_head.": "head."}
    return pretraining | in_classifier | heads


def _mmpretrain_prefixes() -> dict[str, str]:
    """They number the layers of the projector. We also count the ReLUs between them."""
    linear = {f"neck.fc{i}.": f"projector.{3 * i}." for i in range(8)}
    batch_norm = {f"neck.bn{i}.": f"projector.{3 * i + 1}." for i in range(8)}
    return {"backbone.": "backbone.", "head.fc.": "head."} | linear | batch_norm


LAYOUTS = {
    "vissl": Layout(
        {"_feature_blocks.": "backbone."},
        signature=r"_feature_blocks\.",
    ),
    "lightly": Layout(
        _lightly_prefixes(),
        signature=(
            r"(model\.)?(projection_head\.|backbone\.\d)|online_classifier\.|classification_head\."
        ),
        ignored=r"model\.online_classifier\.",
        linear_biases=1,
    ),
    "mmpretrain": Layout(
        _mmpretrain_prefixes(),
        signature=r"neck\.|head\.|data_preprocessor\.",
        ignored=r"head\.bn\.|data_preprocessor\.",
    ),
    # The authors' checkpoint.pth. Their resnet50.pth has torchvision's layout.
    "barlowtwins": Layout(
        {"backbone.": "backbone.", "projector.": "projector."},
        signature=r"bn\.running_mean",
        ignored=r"bn\.",
    ),
    "solo-learn": Layout(
        {
            "backbone.": "backbone.",
            "projector.": "projector.",
            "classifier.": "head.",
            "encoder.": "backbone.",  # in older versions
        },
        signature=r"encoder\.|classifier\.|projector\.0\.bias|momentum_",
        ignored=r"momentum_|predictor\.",
        linear_biases=ALL_LINEAR_LAYERS,
    ),
    "twinfeed": Layout(
        {"backbone.": "backbone.", "projector.": "projector."},
        signature=r"projector\.|backbone\.",
    ),
    "torchvision": Layout(_TORCHVISION_PREFIXES, signature="conv1|bn1|layer1"),
    "timm": Layout(_TORCHVISION_PREFIXES),
    "detectron2": Layout({"": "backbone."}),
    "safetensors": Layout(_TORCHVISION_PREFIXES),
}
"""The layouts by name, in the order in which their signatures are tried."""


def find_layout(names: Iterable[str]) -> str:
    """The name of the first layout with a matching signature; "torchvision" if there is none."""
    names = list(names)
    for layout_name, layout in LAYOUTS.items():
        signature = layout.signature
        if signature is not None and any(re.match(signature, name) for name in names):
            return layout_name
    return "torchvision"
