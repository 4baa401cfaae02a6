"""Starting a pretraining run from the checkpoint of another project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backbone import build_backbone
from ..barlow_twins import BarlowTwins
from ..checkpoint import configuration_changes
from ..lars import LARS, parameter_groups
from .reading import parse_weights
from .safe_load import safe_load
from .weights import Weights, find_architecture, small_stem_padding


def continue_from(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a new run starts from, with the weights of another project.

    From the authors' checkpoint.pth, momenta and epoch are taken over too. From any other file, the
    optimizer starts anew at step 0.

    Args:
        path: A pretraining checkpoint in any of `LAYOUTS`.
        settings: Those of the run, as our checkpoints contain them.

    Returns:
        A checkpoint with "model", "optimizer", "scaler" and "step".

    Raises:
        ValueError: The file cannot be read, has no projector, or does not fit the settings.
    """
    content = safe_load(path)
    weights = parse_weights(content, path)
    _check_architecture(weights, settings, path)

    with torch.device("meta"):
        backbone = build_backbone(settings["backbone"], settings["width"], settings["small_stem"])
        network = BarlowTwins(backbone, settings["projector"], settings["lambd"])
    network.backbone.load_state_dict(weights.backbone, assign=True)
    network.projector.load_state_dict(weights.projector, assign=True)
    optimizer = LARS(parameter_groups(network, weight_decay=0.0))

    step = 0
    if weights.layout == "barlowtwins" and "optimizer" in content:
        epoch = _restore_authors_optimizer(optimizer, content, settings, path)
        step = epoch * (settings["images"] // settings["batch_size"])
    scaler = torch.amp.GradScaler("cpu")
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
    }


def _check_architecture(weights: Weights, settings: Mapping[str, Any], path: Path) -> None:
    if not weights.projector:
        raise ValueError(
            f"{path} has no projector, which pretraining needs: name a whole pretraining checkpoint"
        )
    architecture = find_architecture(weights)
    assert architecture is not None  # parse_weights has checked that
    saved: dict[str, Any] = architecture._asdict()
    current = {name: settings[name] for name in saved}
    if architecture.small_stem:
        saved["stem_padding"] = small_stem_padding(weights.layout)
        current["stem_padding"] = small_stem_padding("twinfeed")
    changes = configuration_changes(saved, current)
    if changes:
        raise ValueError(f"{path} does not fit this configuration: {'; '.join(changes)}")


def _restore_authors_optimizer(
    optimizer: LARS, content: Mapping[str, Any], settings: Mapping[str, Any], path: Path
) -> int:
    """Take over the momenta of the authors' checkpoint. Returns the number of finished epochs."""
    try:
        epoch = int(content["epoch"])  # the next one to train, counted from 0
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
            f"{path} does not contain the optimizer of the authors' main.py: {error!r}"
        ) from None
    if epoch >= settings["epochs"]:
        raise ValueError(
            f"{path} has {epoch} finished epochs: --epochs must be greater than {epoch}"
        )
    return epoch


def _take_momenta(optimizer: LARS, saved: Mapping[str, Any], lr: float, lr_biases: float) -> None:
    """Set the momenta to those of the authors' optimizer.

    Both optimizers have two groups, weights and one-dimensional parameters, each in the order of
    the network's parameters.

    The momenta of weights are sums of gradients that LARS has normalised, so they are the same
    here. Those of the other parameters are sums of gradients that are W times too small (W: number
    of GPUs), which the authors multiply by a learning rate that is W times higher; see
    docs/method.md, "The scale of the gradient". The product of rate and momentum is the step, and
    must not jump. So these momenta are multiplied by their rate over ours. Both rates are taken
    relative to the rate of the weights, because the file has the rates of one step of the schedule,
    and the run may use another batch size.
    """
    saved_weights, saved_biases = saved["param_groups"]
    bias_factor = 0.0
    if lr_biases:
        bias_factor = saved_biases["lr"] / saved_weights["lr"] * lr / lr_biases
    weights, biases = optimizer.param_groups
    for factor, saved_group, group in (
        (1.0, saved_weights, weights),
        (bias_factor, saved_biases, biases),
    ):
        for number, p in zip(saved_group["params"], group["params"], strict=True):
            mu = saved["state"][number]["mu"]
            if mu.shape != p.shape:
                raise ValueError(
                    f"momentum has shape {list(mu.shape)}, parameter has shape {list(p.shape)}"
                )
            optimizer.state[p]["mu"] = mu.float() * factor
