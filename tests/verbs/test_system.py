"""train.py as a whole, in float64, against a plain loop that shares only its batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import model
import pipeline
import train
from experiment.console import Console
from experiment.metrics import read_metrics
from experiment.presets import parse
from tests.helpers.images import write_photos

BATCH = 8
EPOCHS = 4
STEPS = 20
SEED = 3
SIZE = 32
PROJECTOR = "48-48-48"
# Larger than usual, so that an error in any of them is seen.
LR = 6.4
LR_BIASES = 3.2
WEIGHT_DECAY = 0.01
ETA = 0.02
MOMENTUM = 0.8
LAMBD = 0.02
LOSS_SCALE = 0.5

OPTIONS = {
    "run-folder": "run",
    "device": "cpu",
    "log-steps": 1,
    "seed": SEED,
    "size": SIZE,
    "width": 64,
    "projector": PROJECTOR,
    "lambd": LAMBD,
    "loss-scale": LOSS_SCALE,
    "epochs": EPOCHS,
    "batch-size": BATCH,
    "lr": LR,
    "lr-biases": LR_BIASES,
    "weight-decay": WEIGHT_DECAY,
    "eta": ETA,
    "momentum": MOMENTUM,
    "warmup-epochs": 1,
}


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks and views in float64."""
    open_loader = pipeline.open_loader

    def open_float64_loader(
        store: pipeline.Store, recipe: pipeline.Recipe, options: pipeline.LoaderOptions
    ) -> pipeline.Loader:
        return open_loader(store, recipe, replace(options, dtype=torch.float64))

    monkeypatch.setattr(pipeline, "open_loader", open_float64_loader)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def plain_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b))
    c = a.T @ b / BATCH
    on_diagonal = (torch.diagonal(c) - 1).pow(2).sum()
    off_diagonal = c.masked_fill(torch.eye(len(c), dtype=torch.bool), 0).pow(2).sum()
    return LOSS_SCALE * (on_diagonal + LAMBD * off_diagonal)


def plain_factor(step: int) -> float:
    """Of the learning rate: linear warm-up for an epoch, then cosine decay to a thousandth."""
    warmup = STEPS // EPOCHS
    if step < warmup:
        return step / warmup
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
    return q + 0.001 * (1 - q)


def plain_loop(network: nn.ModuleDict, batches: Iterator[pipeline.Batch]) -> list[float]:
    """Train the network, and return the loss of each step."""
    backbone, projector = network["backbone"], network["projector"]
    parameters = [*backbone.parameters(), *projector.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    losses = []
    for step, ((view_a, view_b), _, _) in enumerate(batches):
        z_a = projector(backbone(view_a))
        z_b = projector(backbone(view_b))
        loss = plain_loss(z_a, z_b)
        losses.append(float(loss.detach()))

        grads = torch.autograd.grad(loss, parameters)
        for p, g, mu in zip(parameters, grads, momenta, strict=True):
            peak = LR_BIASES if p.ndim == 1 else LR
            lr = plain_factor(step) * BATCH / 256 * peak
            if p.ndim > 1:
                g = g + WEIGHT_DECAY * p.data
                if g.norm() > 0 and p.norm() > 0:
                    g = g * ETA * p.data.norm() / g.norm()
            mu.mul_(MOMENTUM).add_(g)
            p.data -= lr * mu
    return losses


def plain_network() -> nn.ModuleDict:
    backbone = torchvision.models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    projector = nn.Sequential(
        *(nn.Linear(512, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()),
        *(nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()),
        nn.Linear(48, 48, bias=False),
    )
    return nn.ModuleDict({"backbone": backbone, "projector": projector})


@pytest.mark.usefixtures("float64")
def test_twenty_steps_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = write_photos(tmp_path / "photos", 5 * BATCH + 3, classes=1)
    arguments = [f"--{name}={value}" for name, value in OPTIONS.items()]
    arguments += ["--data", str(photos), "--blur-sigma", "0.1", "2.0"]
    with Console() as console:
        assert train.main(*parse(arguments), console) == 0

    torch.manual_seed(SEED)
    start = model.BarlowTwins(model.build_backbone("resnet18"), PROJECTOR, LAMBD).state_dict()
    network = plain_network()
    network.load_state_dict(start)
    loader = pipeline.open_loader(
        pipeline.open_store(photos),
        pipeline.barlow_twins(SIZE),
        pipeline.LoaderOptions(batch_size=BATCH, seed=SEED, threads=1),
    )
    expected_losses = plain_loop(network, loader.steps(0, STEPS))

    losses = [row["loss"] for row in read_metrics(Path("run/metrics.jsonl"))]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    weights = model.load_checkpoint(Path("run/checkpoint.pt"))["model"]
    expected_weights = network.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-8, msg=name)

    changes = [
        float((weights[name] - start[name]).norm() / start[name].norm())
        for name in start
        if "conv" in name
    ]
    assert max(changes) > 0.01, "the network must have learned something"
