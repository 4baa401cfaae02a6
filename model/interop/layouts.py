"""Weights in the layouts of other programs, in and out: which entries there are, and what they are called."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..backbone import BACKBONES, Backbone, build_backbone
from ..barlow_twins import build_projector
from ..files import write_atomically
from .safe_load import safe_load


@dataclass(frozen=True)
class Weights:
    """What a file holds of a network, by our names, on the CPU in float32."""

    layout: str  # whose it came in: one of LAYOUTS
    backbone: dict[str, Tensor]  # torchvision's names, without fc
    projector: dict[
        str, Tensor
    ]  # "0.weight", "1.running_mean", ... of `build_projector`; {} where there is none
    head: dict[
        str, Tensor
    ]  # "weight" [C, F] and "bias" [C] of a linear classifier; {} where there is none
    classes: list[str]  # names of its outputs; [] where the file does not say
    size: int | None  # side of the views that it was trained with, pixels, where the file says
    epochs: int | None = None  # of its pretraining, where the file says


@dataclass(frozen=True)
class _Layout:
    sign: (
        str | None
    )  # no file has this layout that has no entry whose name begins like this (a pattern)
    names: dict[
        str, str
    ]  # how their names begin: how ours do. Of several for one of ours, the first is written
    ignored: str = "$."  # what begins like this (a pattern) is left out, since no part of ours computes with it
    biased: int = 0  # how many linear layers of their projector, the last ones, have biases: the loss cancels them
    write: Callable[[dict[str, Tensor], Weights], bytes] | None = None


def _torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _lightning_file(entries: dict[str, Tensor], weights: Weights) -> bytes:
    return _torch_file({"state_dict": entries})


def _mmpretrain_file(entries: dict[str, Tensor], weights: Weights) -> bytes:
    about = {"dataset_meta": {"classes": weights.classes}} if weights.classes else {}
    return _torch_file({"meta": about, "state_dict": entries})


def _detectron2_file(entries: dict[str, Tensor], weights: Weights) -> bytes:
    """As its tools/convert-torchvision-to-d2.py writes it."""
    model = {}
    for name, value in entries.items():
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = name if name.startswith("res") else f"stem.{name}"
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[name] = value.numpy()
    return pickle.dumps({"model": model, "__author__": "twinfeed", "matching_heuristics": True})


def _safetensors_file(entries: dict[str, Tensor], weights: Weights) -> bytes:
    names = ("size", "classes", "layout", "epochs")
    about = {name: getattr(weights, name) for name in names}
    return safetensors.torch.save(entries, {"twinfeed": json.dumps(about)})


_TORCHVISION = {"fc.": "head.", "": "backbone."}
_LIGHTLY = {"backbone.": "backbone.", "projection_head.layers.": "projector."}
# As the examples make the backbone: nn.Sequential(*list(resnet.children())[:-1])
_LIGHTLY |= {"backbone.0.": "backbone.conv1.", "backbone.1.": "backbone.bn1."}
_LIGHTLY |= {f"backbone.{stage + 3}.": f"backbone.layer{stage}." for stage in range(1, 5)}
_LIGHTLY |= {
    f"model.{name}": ours for name, ours in _LIGHTLY.items()
}  # of a classifier that was trained after it
_LIGHTLY |= {"online_classifier.classification_head.": "head.", "classification_head.": "head."}

# The first whose sign is found. mmpretrain numbers the projector's layers, the others also the ReLUs between them.
LAYOUTS = {
    "vissl": _Layout(r"_feature_blocks\.", {"_feature_blocks.": "backbone."}),
    "lightly": _Layout(
        r"(model\.)?(projection_head\.|backbone\.\d)|online_classifier\.|classification_head\.",
        _LIGHTLY,
        ignored=r"model\.online_classifier\.",
        biased=1,
        write=_lightning_file,
    ),
    "mmpretrain": _Layout(
        r"neck\.|head\.|data_preprocessor\.",
        {"backbone.": "backbone.", "head.fc.": "head."}
        | {f"neck.fc{i}.": f"projector.{3 * i}." for i in range(8)}
        | {f"neck.bn{i}.": f"projector.{3 * i + 1}." for i in range(8)},
        ignored=r"head\.bn\.|data_preprocessor\.",
        write=_mmpretrain_file,
    ),
    "barlowtwins": _Layout(  # the authors' checkpoint.pth; their resnet50.pth is torchvision's layout
        r"bn\.running_mean", {"backbone.": "backbone.", "projector.": "projector."}, ignored=r"bn\."
    ),
    "solo-learn": _Layout(
        r"encoder\.|classifier\.|projector\.0\.bias|momentum_",
        {
            "backbone.": "backbone.",
            "projector.": "projector.",
            "classifier.": "head.",
            "encoder.": "backbone.",
        },
        ignored=r"momentum_|predictor\.",
        biased=99,
        write=_lightning_file,
    ),
    "twinfeed": _Layout(
        r"projector\.|backbone\.", {"backbone.": "backbone.", "projector.": "projector."}
    ),
    "torchvision": _Layout(
        "conv1|bn1|layer1", _TORCHVISION, write=lambda entries, weights: _torch_file(entries)
    ),
    "timm": _Layout(None, _TORCHVISION, write=lambda entries, weights: _torch_file(entries)),
    "detectron2": _Layout(None, {"": "backbone."}, write=_detectron2_file),
    "safetensors": _Layout(None, _TORCHVISION, write=_safetensors_file),
}
EXPORTS = tuple(name for name, layout in LAYOUTS.items() if layout.write)

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
    """Weights of a ResNet in a torch or safetensors file of any of LAYOUTS, or in the folder of a run of ours.

    ValueError, in one line, where the file does not hold them whole: nothing is left out silently.
    """
    if path.is_dir() and not (path / "checkpoint.pt").exists():
        raise ValueError(f"{path} holds no checkpoint.pt: name the file of weights itself")
    path = path / "checkpoint.pt" if path.is_dir() else path
    return find_weights(safe_load(path), path)


def find_weights(content: Any, path: Path) -> Weights:
    """The same, in what was read from `path`."""
    entries = _dict(content)
    for _ in _WRAPPERS:
        entries = next(
            (entries[name] for name in _WRAPPERS if isinstance(entries.get(name), dict)), entries
        )
    # Without what DistributedDataParallel and torch.compile put before a module's names
    found = {
        re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", str(name)): value
        for name, value in entries.items()
    }
    found.pop("__metadata__", None)
    signs = ((name, layout.sign) for name, layout in LAYOUTS.items() if layout.sign)
    layout = next(
        (name for name, sign in signs if any(re.match(sign, key) for key in found)), "torchvision"
    )
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projector": {}, "head": {}}
    unknown = []
    for key, value in found.items():
        begin = max(
            (name for name in LAYOUTS[layout].names if key.startswith(name)), key=len, default=None
        )
        part, _, name = (
            "" if begin is None else LAYOUTS[layout].names[begin] + key[len(begin) :]
        ).partition(".")
        if re.match(LAYOUTS[layout].ignored, key):
            continue
        if begin is None or not isinstance(value, Tensor) or name in parts[part]:
            unknown.append(key)
        else:
            parts[part][name] = (value.float() if value.is_floating_point() else value).contiguous()
    _fold_biases(parts["projector"])
    for entries in (parts["backbone"], parts["projector"]):
        for name in [
            name for name in entries if name.endswith(".running_mean")
        ]:  # VISSL's and older ones lack it
            entries.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    try:
        about = _about(_dict(content))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged: what it says about itself is no JSON: {error}"
        ) from None
    layout = about["layout"] if str(about.get("layout")) in LAYOUTS else layout
    named = len(about["classes"]) == len(parts["head"].get("weight", ()))
    classes = about["classes"] if named else []
    weights = Weights(layout, **parts, classes=classes, size=about["size"], epochs=about["epochs"])
    _empty_backbone(weights, path, unknown)
    return weights


def architecture(weights: Weights) -> dict[str, Any] | None:
    """What `ModelConfig` calls "backbone", "width", "small_stem" and "projector" ("" for none); None for no ResNet."""
    stem = weights.backbone.get("conv1.weight", torch.empty(0))
    blocks = {
        found[0] for name in weights.backbone if (found := re.match(r"layer\d+\.\d+\.", name))
    }
    depths = [sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in range(1, 5)]
    kind = Bottleneck if "layer1.0.conv3.weight" in weights.backbone else BasicBlock
    name = next((name for name, known in BACKBONES.items() if known == (kind, depths)), None)
    if name is None or stem.ndim != 4:
        return None
    layers = (
        (int(name.split(".")[0]), len(x))
        for name, x in weights.projector.items()
        if _is_linear(name, x)
    )
    widths = "-".join(str(width) for _, width in sorted(layers))
    return {
        "backbone": name,
        "width": len(stem),
        "small_stem": stem.shape[-1] == 3,
        "projector": widths,
    }


def stem_padding(weights: Weights) -> int:
    """Pixels that a small stem adds on each side: 2 in solo-learn's (solo/methods/base.py), 1 in all others'."""
    return 2 if weights.layout == "solo-learn" else 1


def load_backbone(weights: Weights, path: Path) -> Backbone:
    """The network that they are of, in eval mode. ValueError, naming `path`, where they are not a whole one."""
    backbone = _empty_backbone(weights, path)
    if bad := [name for name, value in weights.backbone.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{path}: {len(bad)} of its tensors are not finite ({bad[0]}): take earlier ones"
        )
    backbone.load_state_dict(
        {name: value.clone() for name, value in weights.backbone.items()}, assign=True
    )
    if backbone.conv1.kernel_size == (3, 3):
        backbone.conv1.padding = (stem_padding(weights),) * 2
    return backbone.eval()


def export(weights: Weights, layout: str, path: Path) -> None:
    """Write them to a file in one of EXPORTS, with the projector and head where they have one and the layout does.

    "safetensors" has torchvision's names and says `size`, `classes` and `layout`: `read_weights` returns the same of
    it, but for the projector. ValueError where the layout cannot hold them.
    """
    if layout not in EXPORTS:
        raise ValueError(
            f"there is no layout {layout!r} to export to: choose one of {', '.join(EXPORTS)}"
        )
    if layout == "detectron2" and path.suffix != ".pkl":
        raise ValueError(f"{path}: detectron2 reads such a file only if its name ends with .pkl")
    small_stem = weights.backbone["conv1.weight"].shape[-1] == 3
    if (
        small_stem
        and layout != "safetensors"
        and stem_padding(weights) != (2 if layout == "solo-learn" else 1)
    ):
        raise ValueError(
            f"{path}: solo-learn's small stem adds a border of 2 pixels, all others' 1, so these weights would not do "
            f"the same in {layout}'s layout: export them to safetensors"
        )
    names, entries, linear = LAYOUTS[layout].names, dict[str, Tensor](), list[str]()
    for part, tensors in (
        ("backbone", weights.backbone),
        ("projector", weights.projector),
        ("head", weights.head),
    ):
        for name, value in tensors.items():
            if (key := _theirs(names, f"{part}.{name}")) is not None:
                entries[key] = value.detach().cpu().contiguous()
                if part == "projector" and _is_linear(name, value):
                    linear.append(key)
    for key in linear[max(0, len(linear) - LAYOUTS[layout].biased) :]:
        entries[key.replace("weight", "bias")] = torch.zeros(len(entries[key]))
    write = LAYOUTS[layout].write
    assert write is not None
    write_atomically(path, write(entries, weights))


def export_backbone(
    backbone: Backbone, folder: Path, size: int | None = None, epochs: int | None = None
) -> Path:
    """Write the backbone as `backbone.safetensors` (returned) and `backbone.pth`, a torchvision `state_dict`.

    Both have torchvision's names without `fc`, contiguous float tensors on the CPU. size: of the views, pixels.
    epochs: of the pretraining.
    """
    weights = Weights("twinfeed", backbone.state_dict(), {}, {}, [], size, epochs)
    path = folder / "backbone.safetensors"
    export(weights, "safetensors", path)
    export(weights, "torchvision", folder / "backbone.pth")
    return path


def _theirs(names: Mapping[str, str], ours: str) -> str | None:
    return next(
        (begin + ours.removeprefix(own) for begin, own in names.items() if ours.startswith(own)),
        None,
    )


def _fold_biases(projector: dict[str, Tensor]) -> None:
    """Takes the biases of linear layers out. One before a batch norm is subtracted from its running mean: the same.

    That of the last layer is dropped: the loss takes the mean from what the layer puts out.
    """
    for name in [name for name, value in projector.items() if _is_linear(name, value)]:
        layer, outputs = int(name.split(".")[0]), projector[name].shape[:1]
        if (bias := projector.get(f"{layer}.bias")) is not None and bias.shape == outputs:
            del projector[f"{layer}.bias"]
            if (
                mean := projector.get(f"{layer + 1}.running_mean")
            ) is not None and mean.shape == outputs:
                projector[f"{layer + 1}.running_mean"] = mean - bias


def _is_linear(name: str, value: Tensor) -> bool:
    """Whether it is the weight of one of the projector's linear layers, "3.weight"."""
    return value.ndim == 2 and re.fullmatch(r"\d+\.weight", name) is not None


def _about(content: dict[str, Any]) -> dict[str, Any]:
    """ "size", "classes", "layout" and "epochs", as far as the file says."""
    meta, about = _dict(content.get("meta")), _dict(content.get("settings"))
    epochs = content.get("epoch") if "model" in content else None  # the authors'
    step, images, batch = content.get("step"), about.get("images"), about.get("batch_size")
    if (
        isinstance(step, int)
        and isinstance(images, int)
        and isinstance(batch, int)
        and images >= batch > 0
    ):  # ours
        epochs = step // (images // batch)
    if ours := _dict(content.get("__metadata__")).get("twinfeed"):
        about = _dict(json.loads(ours))
        epochs = about.get("epochs")
    # mmpretrain's, and before 1.0
    classes = (
        about.get("classes")
        or _dict(meta.get("dataset_meta")).get("classes")
        or meta.get("CLASSES")
    )
    size = about.get("size") if isinstance(about.get("size"), int) else None
    epochs = epochs if isinstance(epochs, int) else None
    classes = [*map(str, classes)] if isinstance(classes, list | tuple) else []
    return about | {"classes": classes, "size": size, "epochs": epochs}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _empty_backbone(weights: Weights, path: Path, unknown: Sequence[str] = ()) -> Backbone:
    """The network without memory for its weights. ValueError where they, a projector's or a head's do not fit."""
    known = architecture(weights)
    if known is None:
        begin = ", ".join([*weights.backbone, *unknown][:3])
        raise ValueError(
            f"{path} holds no ResNet that twinfeed knows ({', '.join(BACKBONES)})"
            + (
                f": its entries are {begin}, ..."
                if begin
                else ": it has no weights by name (save state_dict())"
            )
        )
    widths = known.pop("projector")
    with torch.device("meta"):
        backbone = build_backbone(*known.values())
        modules: dict[str, nn.Module] = {"backbone": backbone}
        if widths:
            modules["projector"] = build_projector(backbone.out_features, widths)
        if weights.head:
            modules["head"] = nn.Linear(
                backbone.out_features, next(iter(weights.head.values())).shape[:1].numel()
            )
    want = {
        f"{part}.{name}": value
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }
    parts = {"backbone": weights.backbone, "projector": weights.projector, "head": weights.head}
    have = {
        f"{part}.{name}": value
        for part, entries in parts.items()
        for name, value in entries.items()
    }
    names = LAYOUTS[weights.layout].names
    shapes = [name for name in want if name in have and want[name].shape != have[name].shape]
    wrong: dict[str, list[Any]] = {
        "missing": [_theirs(names, name) for name in want if name not in have],
        "unexpected": [*unknown, *(_theirs(names, name) for name in have if name not in want)],
        "misshapen": [
            f"{_theirs(names, n)} {list(have[n].shape)} for {list(want[n].shape)}" for n in shapes
        ],
    }
    said = (
        f"{len(these)} {what} ({', '.join(map(str, these[:3]))}{', ...' * (len(these) > 3)})"
        for what, these in wrong.items()
        if these
    )
    if why := "; ".join(said):
        raise ValueError(
            f"{path} does not hold a whole {known['backbone']} in the layout of {weights.layout}: {why}"
        )
    return backbone
