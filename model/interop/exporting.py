"""Writing weights in the layouts of other projects."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..backbone import Backbone
from .layouts import LAYOUTS
from .weights import Weights, is_linear_weight, small_stem_padding


def export(weights: Weights, layout: str, path: Path) -> None:
    """Write weights to a file in the layout of another project.

    Projector and head are written too if the layout has a place for them. "safetensors" has
    torchvision's names and, as metadata, `size`, `classes`, `layout` and `epochs`: `read_weights`
    returns all but the projector again.

    Args:
        weights: The weights.
        layout: One of `EXPORTS`.
        path: The file to write, atomically.

    Raises:
        ValueError: There is no such layout, or it cannot represent the weights.
        OSError: Writing failed.
    """
    _check_can_export(weights, layout, path)
    entries = _rename_entries(weights, layout)
    write_atomically(path, _WRITERS[layout](entries, weights))


def export_backbone(
    backbone: Backbone, folder: Path, size: int | None = None, epochs: int | None = None
) -> Path:
    """Write `backbone.safetensors` and `backbone.pth`, a `state_dict` of torchvision.

    Both have torchvision's names without `fc`, and contiguous float tensors on the CPU.

    Args:
        backbone: The network.
        folder: Where to write the files.
        size: Side of the views it was trained on, in pixels.
        epochs: Epochs of its pretraining.

    Returns:
        The path of `backbone.safetensors`.
    """
    weights = Weights(
        layout="twinfeed",
        backbone=backbone.state_dict(),
        projector={},
        head={},
        classes=[],
        size=size,
        epochs=epochs,
    )
    path = folder / "backbone.safetensors"
    export(weights, "safetensors", path)
    export(weights, "torchvision", folder / "backbone.pth")
    return path


def _check_can_export(weights: Weights, layout: str, path: Path) -> None:
    if layout not in EXPORTS:
        raise ValueError(
            f"there is no layout {layout!r} to export to: choose one of {', '.join(EXPORTS)}"
        )
    if layout == "detectron2" and path.suffix != ".pkl":
        raise ValueError(f"{path}: detectron2 reads such a file only if its name ends with .pkl")

    has_small_stem = weights.backbone["conv1.weight"].shape[-1] == 3
    same_padding = small_stem_padding(weights.layout) == small_stem_padding(layout)
    if has_small_stem and not same_padding and layout != "safetensors":
        raise ValueError(
            f"{path}: solo-learn's small stem pads by 2 pixels and every other one by 1, so these "
            f"weights would compute other features in {layout}'s layout: export them to "
            "safetensors"
        )


def _rename_entries(weights: Weights, layout_name: str) -> dict[str, Tensor]:
    """The entries in the names of a layout, and zeros for biases that only its projector has."""
    layout = LAYOUTS[layout_name]
    entries: dict[str, Tensor] = {}
    linear_layers: list[str] = []
    for our_name, value in weights.entries().items():
        name = layout.to_their_name(our_name)
        if name is None:
            continue
        entries[name] = value.detach().cpu().contiguous()
        part, _, name_in_part = our_name.partition(".")
        if part == "projector" and is_linear_weight(name_in_part, value):
            linear_layers.append(name)

    first_with_bias = max(0, len(linear_layers) - layout.linear_biases)
    for name in linear_layers[first_with_bias:]:
        entries[name.replace("weight", "bias")] = torch.zeros(len(entries[name]))
    return entries


def _torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _write_state_dict(entries: dict[str, Tensor], weights: Weights) -> bytes:
    return _torch_bytes(entries)


def _write_lightning(entries: dict[str, Tensor], weights: Weights) -> bytes:
    return _torch_bytes({"state_dict": entries})


def _write_mmpretrain(entries: dict[str, Tensor], weights: Weights) -> bytes:
    meta = {"dataset_meta": {"classes": weights.classes}} if weights.classes else {}
    return _torch_bytes({"meta": meta, "state_dict": entries})


def _write_detectron2(entries: dict[str, Tensor], weights: Weights) -> bytes:
    """The file that their tools/convert-torchvision-to-d2.py writes."""
    model = {_detectron2_name(name): value.numpy() for name, value in entries.items()}
    return pickle.dumps({"model": model, "__author__": "twinfeed", "matching_heuristics": True})


def _detectron2_name(name: str) -> str:
    """ "res2.0.conv1.norm.weight" from torchvision's "layer1.0.bn1.weight"."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    if not name.startswith("res"):
        name = f"stem.{name}"
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _write_safetensors(entries: dict[str, Tensor], weights: Weights) -> bytes:
    facts = {
        "size": weights.size,
        "classes": weights.classes,
        "layout": weights.layout,
        "epochs": weights.epochs,
    }
    return safetensors.torch.save(entries, {"twinfeed": json.dumps(facts)})


_WRITERS: dict[str, Callable[[dict[str, Tensor], Weights], bytes]] = {
    "lightly": _write_lightning,
    "mmpretrain": _write_mmpretrain,
    "solo-learn": _write_lightning,
    "torchvision": _write_state_dict,
    "timm": _write_state_dict,
    "detectron2": _write_detectron2,
    "safetensors": _write_safetensors,
}

EXPORTS = tuple(_WRITERS)
"""The layouts that `export` writes."""
