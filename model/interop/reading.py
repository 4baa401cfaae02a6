"""Reading weights from the files of other projects and from our own runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import LAYOUTS, find_layout
from .safe_load import safe_load
from .weights import Weights, build_empty_backbone, is_linear_weight

# Keys under which a file may have its entries, possibly several of them nested.
_WRAPPERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "classy_state_dict",
    "base_model",
    "trunk",
)


def read_weights(path: Path) -> Weights:
    """Read the weights of a ResNet from a file in any of `LAYOUTS`.

    Args:
        path: A torch or safetensors file, or the folder of a run.

    Raises:
        ValueError: The file does not contain a whole network, or contains entries that are not
            understood: no entry is dropped silently. The message is one line.
    """
    if path.is_dir():
        if not (path / "checkpoint.pt").exists():
            raise ValueError(f"{path} has no checkpoint.pt: name the file of weights itself")
        path = path / "checkpoint.pt"
    return parse_weights(safe_load(path), path)


def parse_weights(content: Any, path: Path) -> Weights:
    """The same, from content that `safe_load` has read from `path`."""
    entries = _unwrap(content)
    layout_name = find_layout(entries)
    parts, unknown = _split_into_parts(entries, layout_name)
    _fold_biases(parts["projector"])
    _add_missing_counts(parts["backbone"])
    _add_missing_counts(parts["projector"])

    facts = _read_facts(_as_dict(content), path)
    weights = Weights(
        layout=facts.layout or layout_name,
        backbone=parts["backbone"],
        projector=parts["projector"],
        head=parts["head"],
        classes=facts.classes,
        size=facts.size,
        epochs=facts.epochs,
    )
    build_empty_backbone(weights, path, unknown)  # raises if they are not a whole network

    # Checkpoints of pretraining may have the classes of the data, although they have no head.
    outputs = len(weights.head["weight"]) if weights.head else 0
    if len(weights.classes) != outputs:
        return replace(weights, classes=[])
    return weights


def _unwrap(content: Any) -> dict[str, Any]:
    """The entries of a file, with the names that they have in the network itself."""
    entries = _as_dict(content)
    for _ in _WRAPPERS:  # a limit, because a file may contain itself
        wrappers = [name for name in _WRAPPERS if isinstance(entries.get(name), dict)]
        if not wrappers:
            break
        entries = entries[wrappers[0]]

    # DistributedDataParallel and torch.compile add these to the names.
    added_by_torch = r"(^|(?<=\.))(module|_orig_mod)\."
    entries = {re.sub(added_by_torch, "", str(name)): value for name, value in entries.items()}
    entries.pop("__metadata__", None)
    return entries


def _split_into_parts(
    entries: dict[str, Any], layout_name: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The entries of backbone, projector and head in our names; and the names of all others."""
    layout = LAYOUTS[layout_name]
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projector": {}, "head": {}}
    unknown = []
    for their_name, value in entries.items():
        if layout.is_ignored(their_name):
            continue
        our_name = layout.to_our_name(their_name)
        if our_name is None or not isinstance(value, Tensor):
            unknown.append(their_name)
            continue
        part, _, name = our_name.partition(".")
        if name in parts[part]:  # two names for the same entry
            unknown.append(their_name)
            continue
        if value.is_floating_point():
            value = value.float()
        parts[part][name] = value.contiguous()
    return parts, unknown


def _fold_biases(projector: dict[str, Tensor]) -> None:
    """Remove the biases of the linear layers, which our projector does not have.

    A bias before a batch normalisation is subtracted from its running mean, which gives the same
    output. The bias of the last layer is dropped: the loss subtracts the mean of the embeddings.
    """
    linear_weights = [name for name, value in projector.items() if is_linear_weight(name, value)]
    for name in linear_weights:
        layer = int(name.split(".")[0])
        outputs = projector[name].shape[:1]
        bias = projector.get(f"{layer}.bias")
        if bias is None or bias.shape != outputs:
            continue
        del projector[f"{layer}.bias"]
        mean = projector.get(f"{layer + 1}.running_mean")
        if mean is not None and mean.shape == outputs:
            projector[f"{layer + 1}.running_mean"] = mean - bias


def _add_missing_counts(entries: dict[str, Tensor]) -> None:
    """Add `num_batches_tracked`, which VISSL's files and older ones do not have."""
    running_means = [name for name in entries if name.endswith(".running_mean")]
    for name in running_means:
        count = name.replace("running_mean", "num_batches_tracked")
        entries.setdefault(count, torch.tensor(0))


class _Facts(NamedTuple):
    """What a file contains about its weights."""

    layout: str | None
    classes: list[str]
    size: int | None
    epochs: int | None


def _read_facts(content: dict[str, Any], path: Path) -> _Facts:
    """Any value in a file may have an unexpected type; it is ignored then."""
    settings = _as_dict(content.get("settings"))  # of our runs
    epochs = _pretraining_epochs(content, settings)
    exported = _as_dict(content.get("__metadata__")).get("twinfeed")
    if isinstance(exported, str):
        try:
            settings = _as_dict(json.loads(exported))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: its metadata is not JSON: {error}") from None
        epochs = settings.get("epochs")

    meta = _as_dict(content.get("meta"))  # of mmpretrain
    dataset_meta = _as_dict(meta.get("dataset_meta"))
    # "CLASSES" before version 1.0.
    classes = settings.get("classes") or dataset_meta.get("classes") or meta.get("CLASSES")
    layout = settings.get("layout")
    size = settings.get("size")
    return _Facts(
        layout=layout if isinstance(layout, str) and layout in LAYOUTS else None,
        classes=[str(name) for name in classes] if isinstance(classes, list | tuple) else [],
        size=size if isinstance(size, int) else None,
        epochs=epochs if isinstance(epochs, int) else None,
    )


def _pretraining_epochs(content: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Epochs that are finished, in checkpoints of our runs and in the authors'."""
    step: Any = content.get("step")
    images: Any = settings.get("images")
    batch_size: Any = settings.get("batch_size")
    are_numbers = all(isinstance(value, int) for value in (step, images, batch_size))
    if are_numbers and images >= batch_size > 0:
        return step // (images // batch_size)
    return content.get("epoch") if "model" in content else None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
