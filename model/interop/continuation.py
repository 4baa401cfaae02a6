"""Pretraining that goes on from another project's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backbone import build_backbone
from ..barlow_twins import BarlowTwins
from ..checkpoint import configuration_changes
from ..lars import LARS, parameter_groups
from .layouts import architecture, find_weights, stem_padding
from .safe_load import safe_load


def continue_from(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a new run goes on from, as in a checkpoint: "model", "optimizer", "scaler", "step".

    The network is that of a pretraining checkpoint in any of LAYOUTS. Of the authors' checkpoint.pth come the momenta
    and the epoch too; with any other, the optimizer begins anew at step 0. `settings`: those that a checkpoint of ours
    keeps. ValueError where the file does not fit them.
    """
    content = safe_load(path)
    weights = find_weights(content, path)
    if not weights.projector:
        raise ValueError(
            f"{path} has no projector, which pretraining goes on with: name a whole checkpoint"
        )
    there = architecture(weights) or {}
    here = {name: settings[name] for name in there}
    if there["small_stem"]:
        there["stem_padding"], here["stem_padding"] = stem_padding(weights), 1
    if changes := configuration_changes(there, here):
        raise ValueError(f"{path} does not fit this configuration: {'; '.join(changes)}")
    with torch.device("meta"):
        backbone = build_backbone(settings["backbone"], settings["width"], settings["small_stem"])
        network = BarlowTwins(backbone, settings["projector"], settings["lambd"])
    network.backbone.load_state_dict(weights.backbone, assign=True)
    network.projector.load_state_dict(weights.projector, assign=True)
    optimizer, step = LARS(parameter_groups(network, 0.0)), 0
    if weights.layout == "barlowtwins" and "optimizer" in content:
        try:
            epoch = content["epoch"]  # the next one that they would have begun
            _take_momenta(optimizer, content["optimizer"], settings["lr"], settings["lr_biases"])
        except (
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise ValueError(
                f"{path} has not the optimizer of the authors' main.py: {error!r}"
            ) from None
        if epoch >= settings["epochs"]:
            raise ValueError(f"{path} has {epoch} epochs behind it: --epochs must be more")
        step = epoch * (settings["images"] // settings["batch_size"])
    scaler = torch.amp.GradScaler("cpu")
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
    }


def _take_momenta(optimizer: LARS, theirs: Mapping[str, Any], lr: float, lr_biases: float) -> None:
    """Both optimizers have two groups, weights and one-dimensional parameters, in the order of the network's.

    Momenta of weights are sums of gradients that LARS has normalised, so they are the same here. Those of the others
    are sums of gradients W times too small, which they multiply by a rate W times higher (docs/method.md, "The scale of
    the gradient"). What may not jump is their product: momenta are multiplied by their rate over ours. Both relative to
    the rate of the weights, since the file has rates of one step, and a run may go on with another batch.
    """
    (weights, biases), state = theirs["param_groups"], theirs["state"]
    scale = biases["lr"] / weights["lr"] * lr / lr_biases if lr_biases else 0.0
    for factor, group, own in zip(
        (1.0, scale), (weights, biases), optimizer.param_groups, strict=True
    ):
        for number, p in zip(group["params"], own["params"], strict=True):
            mu = state[number]["mu"]
            if mu.shape != p.shape:
                raise ValueError(f"momenta {list(mu.shape)} for a parameter {list(p.shape)}")
            optimizer.state[p]["mu"] = mu.float() * factor
