"""train.py as a whole, in float64, against a plain loop that follows protocols.md and shares only the batches."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import model
import pipeline
import train
from experiment.console import Console
from experiment.presets import parse
from tests.helpers.images import write_photos

BATCH, EPOCHS, STEPS = 8, 4, 20
LR, LR_BIASES, WD, ETA, MOMENTUM, LAMBD, SCALE = (
    6.4,
    3.2,
    0.01,
    0.02,
    0.8,
    0.02,
    0.5,
)  # large: each must matter


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def plain_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b))
    c = a.T @ b / BATCH
    on = (torch.diagonal(c) - 1).pow(2).sum()
    off = c.masked_fill(torch.eye(len(c), dtype=torch.bool), 0).pow(2).sum()
    return SCALE * (on + LAMBD * off)


def plain_loop(
    backbone: nn.Module, projector: nn.Module, batches: Iterator[pipeline.Batch]
) -> list[float]:
    losses = []
    parameters = [*backbone.parameters(), *projector.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    for step, ((view_a, view_b), _, _) in enumerate(batches):
        z_a = projector(backbone(view_a))
        z_b = projector(backbone(view_b))
        loss = plain_loss(z_a, z_b)
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, parameters)
        warmup = STEPS // EPOCHS  # one epoch
        if step < warmup:
            factor = step / warmup
        else:
            q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
            factor = q + 0.001 * (1 - q)
        for p, g, mu in zip(parameters, grads, momenta, strict=True):
            lr = factor * BATCH / 256 * (LR_BIASES if p.ndim == 1 else LR)
            if p.ndim > 1:
                g = g + WD * p.data
                if g.norm() > 0 and p.norm() > 0:
                    g = g * ETA * p.data.norm() / g.norm()
            mu.mul_(MOMENTUM).add_(g)
            p.data -= lr * mu
    return losses


@pytest.mark.usefixtures("float64")
def test_twenty_steps_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_photos(tmp_path / "photos", 5 * BATCH + 3, classes=1), tmp_path / "run"
    monkeypatch.setattr(
        pipeline, "open_loader", functools.partial(pipeline.open_loader, dtype=torch.float64)
    )
    options = {
        **{"data": folder, "run": run, "device": "cpu", "log-steps": 1, "seed": 3},
        **{"size": 32, "projector": "48-48-48", "lambd": LAMBD, "loss-scale": SCALE},
        **{
            "epochs": EPOCHS,
            "batch-size": BATCH,
            "lr": LR,
            "lr-biases": LR_BIASES,
            "weight-decay": WD,
        },
        **{"eta": ETA, "momentum": MOMENTUM, "warmup-epochs": 1, "width": 64},
    }
    arguments = [
        *(f"--{name}={value}" for name, value in options.items()),
        "--blur-sigma",
        "0.1",
        "2.0",
    ]
    with Console() as console:
        assert train.main(*parse(arguments), console) == 0

    torch.manual_seed(3)
    start = model.BarlowTwins(model.build_backbone("resnet18"), "48-48-48", LAMBD).state_dict()
    backbone = torchvision.models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    projector = nn.Sequential(
        *(nn.Linear(512, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()),
        *(nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()),
        nn.Linear(48, 48, bias=False),
    )
    nn.ModuleDict({"backbone": backbone, "projector": projector}).load_state_dict(start)
    loader = pipeline.open_loader(
        pipeline.open_store(folder),
        pipeline.barlow_twins(32),
        pipeline.LoaderOptions(batch_size=BATCH, seed=3, threads=1),
    )
    expected = plain_loop(backbone, projector, loader.steps(0, STEPS))

    found = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-9)
    final = model.load_checkpoint(run / "checkpoint.pt")["model"]
    plain = nn.ModuleDict({"backbone": backbone, "projector": projector}).state_dict()
    assert final.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(final[name], value, rtol=0, atol=1e-8, msg=name)
    moved = max(
        float((final[name] - start[name]).norm() / start[name].norm())
        for name in start
        if "conv" in name
    )
    assert moved > 0.01, "there is something to compare"
