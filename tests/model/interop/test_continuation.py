"""Pretraining that goes on from other projects' files, the authors' optimizer among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from experiment.config import ModelConfig, OptimConfig, Pretrain, RunConfig
from model import LARS, BarlowTwins, build_backbone, continue_from, load_states, parameter_groups
from tests.helpers.runs import TINY, Command, assert_refused, logged_steps, read_summary

SIZES = (512, 24, 24, 16)
SETTINGS = {
    **asdict(ModelConfig(backbone="resnet18", projector="24-24-16")),
    **asdict(OptimConfig(lr=0.2, lr_biases=0.0048, epochs=9, batch_size=8)),
    "images": 41,
}


class Authors(nn.Module):
    """The network of their main.py, in the order of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(zero_init_residual=True)
        self.backbone.fc = nn.Identity()
        layers: list[nn.Module] = []
        for before, after in pairwise(SIZES[:-1]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(*SIZES[-2:], bias=False))
        self.bn = nn.BatchNorm1d(SIZES[-1], affine=False)


def one_dimensional(p: Tensor) -> bool:
    return p.ndim == 1


def authors_step(groups: list[dict[str, Any]], momenta: dict[Tensor, Tensor], decay: float) -> None:
    """Their LARS, from the formulas of the paper's appendix: momentum 0.9, eta 0.001."""
    for group in groups:
        for p in group["params"]:
            g = p.grad
            if p.ndim > 1:
                g = g + decay * p
                norms = p.norm() * g.norm()
                g = g * (0.001 * p.norm() / g.norm() if norms > 0 else 1.0)
            momenta[p] = 0.9 * momenta[p] + g if p in momenta else g
            p.data -= group["lr"] * momenta[p]


def gradients(parameters: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for p in parameters
    ]


class Theirs:
    """Their network and optimizer, after some steps; `save` writes their checkpoint.pth."""

    def __init__(self, steps: int = 3, world: int = 1) -> None:
        torch.manual_seed(0)
        self.network, self.momenta, self.world = Authors(), dict[Tensor, Tensor](), world
        parameters = list(self.network.parameters())
        weights, biases = (
            [p for p in parameters if (p.ndim == 1) == flat] for flat in (False, True)
        )
        self.groups: list[dict[str, Any]] = [
            {"params": weights, "lr": 0.2},
            {"params": biases, "lr": 0.0048 * world},
        ]
        for step in range(steps):
            self.step(step, factor=0.3 + 0.1 * step)

    def step(self, seed: int, factor: float) -> None:
        parameters = list(self.network.parameters())
        for p, g in zip(parameters, gradients(parameters, seed), strict=True):
            p.grad = g / self.world
        rates = [dict(group, lr=group["lr"] * factor) for group in self.groups]
        with torch.no_grad():
            authors_step(rates, self.momenta, decay=1e-6)
        self.lr = [group["lr"] for group in rates]

    def save(self, path: Path, **changed: Any) -> Path:
        parameters = [p for group in self.groups for p in group["params"]]
        numbers = iter(range(len(parameters)))
        saved = [
            {
                **{"lr": lr, "weight_decay": 1e-6, "momentum": 0.9, "eta": 0.001},
                **{
                    "weight_decay_filter": one_dimensional,
                    "lars_adaptation_filter": one_dimensional,
                },
                "params": [next(numbers) for _ in group["params"]],
            }
            for lr, group in zip(self.lr, self.groups, strict=True)
        ]
        state = {number: {"mu": self.momenta[p]} for number, p in enumerate(parameters)}
        model = {f"module.{name}": value for name, value in self.network.state_dict().items()}
        content = {"epoch": 4, "model": model, "optimizer": {"state": state, "param_groups": saved}}
        torch.save(content | changed, path)
        return path


def ours(
    saved: dict[str, Any], settings: dict[str, Any] = SETTINGS
) -> tuple[BarlowTwins, LARS, dict[str, Any]]:
    """A run's network and optimizer, as train.py makes them and gives them what was saved."""
    network = BarlowTwins(build_backbone("resnet18"), "24-24-16", 0.005).to(
        memory_format=torch.channels_last
    )
    optimizer = LARS(parameter_groups(network, settings["weight_decay"]))
    scaler = torch.amp.GradScaler("cpu")
    rest = load_states(
        {"model": network, "optimizer": optimizer, "scaler": scaler}, saved, Path("x")
    )
    return network, optimizer, rest


def our_step(network: BarlowTwins, optimizer: LARS, seed: int, rates: tuple[float, float]) -> None:
    parameters = list(network.parameters())
    for p, g in zip(parameters, gradients(parameters, seed), strict=True):
        p.grad = g
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.step()


def in_float64(network: nn.Module, momenta: dict[Any, Any]) -> None:
    for p in network.parameters():
        p.data = p.data.double()
        momenta[p] = (
            momenta[p]["mu"].double() if isinstance(momenta[p], dict) else momenta[p].double()
        )


@pytest.mark.parametrize(("world", "tolerance"), [(1, 1e-13), (32, 3e-7)])
def test_the_next_updates_are_the_authors(world: int, tolerance: float, tmp_path: Path) -> None:
    """On W GPUs, their gradient is 1/W of the true one, and the rate of what LARS leaves alone is W times ours.

    (A momentum is multiplied by 1/W in float32, which W = 1 leaves as it is.)
    """
    theirs = Theirs(world=world)
    settings = SETTINGS | {
        "weight_decay": 0.0 if world > 1 else 1e-6
    }  # up to which it cancels for the weights
    network, optimizer, rest = ours(
        continue_from(theirs.save(tmp_path / "checkpoint.pth"), settings), settings
    )
    assert rest == {"step": 4 * 5}
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.parameters(), theirs.network.parameters(), strict=True)
    )
    in_float64(theirs.network, theirs.momenta)
    momenta: dict[Any, Any] = dict(optimizer.state)
    in_float64(network, momenta)
    for p, mu in momenta.items():
        optimizer.state[p]["mu"] = mu
    for seed, factor in ((10, 0.7), (11, 0.6)):
        theirs.step(seed, factor)
        our_step(network, optimizer, seed, (0.2 * factor, 0.0048 * factor))
        for (name, p), q in zip(
            network.named_parameters(), theirs.network.parameters(), strict=True
        ):
            torch.testing.assert_close(
                p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=name
            )


def test_a_jump_of_the_rate_of_biases_leaves_the_next_step_as_long(tmp_path: Path) -> None:
    theirs = Theirs()
    saved = continue_from(
        theirs.save(tmp_path / "x"),
        SETTINGS | {"lr_biases": 0.0048 / 16, "lr": 0.1, "batch_size": 16},
    )
    states = saved["optimizer"]["state"]
    weights, biases = (
        [states[i]["mu"] for i in group["params"]] for group in saved["optimizer"]["param_groups"]
    )
    for mu, p in zip(weights, theirs.groups[0]["params"], strict=True):
        assert torch.equal(mu, theirs.momenta[p])
    for mu, p in zip(biases, theirs.groups[1]["params"], strict=True):
        torch.testing.assert_close(mu * (0.0048 / 16) / 0.1, theirs.momenta[p] * 0.0048 / 0.2)
    assert saved["step"] == 4 * 2


def with_bias(network: Authors) -> dict[str, Tensor]:
    entries = {
        f"{name}": value
        for name, value in network.state_dict().items()
        if not name.startswith("bn.")
    }
    return entries | {f"projector.{i}.bias": torch.ones(n) for i, n in ((0, 24), (3, 24), (6, 16))}


@pytest.mark.parametrize(
    "content",
    [
        lambda network: {"state_dict": with_bias(network)},
        lambda network: {"model": network.state_dict()},
    ],
    ids=["solo-learn", "without an optimizer"],
)
def test_others_begin_anew_with_their_weights(
    content: Callable[[Authors], Any], tmp_path: Path
) -> None:
    theirs = Authors()
    torch.save(content(theirs), tmp_path / "x")
    network, optimizer, rest = ours(continue_from(tmp_path / "x", SETTINGS))
    assert rest == {"step": 0}
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), theirs.parameters(), strict=True)
    )
    assert not optimizer.state_dict()["state"]


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    theirs, path = Theirs(steps=1), tmp_path / "checkpoint.pth"
    good = theirs.save(path)

    def wrong(words: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            continue_from(good, SETTINGS | changed)
        assert str(good) in str(caught.value)
        assert "\n" not in str(caught.value)

    wrong("projector: 24-24-16 saved, 8192-8192-8192 now", projector="8192-8192-8192")
    wrong("backbone: resnet18 saved, resnet50 now", backbone="resnet50")
    wrong("width: 64 saved, 32 now", width=32)
    wrong("has 4 finished epochs: --epochs must be more", epochs=4)
    optimizer = torch.load(path, weights_only=False)["optimizer"]
    for bad in (
        {},
        [1],
        optimizer | {"param_groups": optimizer["param_groups"][:1]},
        optimizer | {"state": {}},
    ):
        theirs.save(path, optimizer=bad)
        wrong("does not contain the optimizer of the authors' main.py")
    backwards = dict(zip(optimizer["state"], reversed(optimizer["state"].values()), strict=True))
    theirs.save(path, optimizer=optimizer | {"state": backwards})
    wrong("a momentum of .* for a parameter")
    torch.save(theirs.network.backbone.state_dict(), path)
    wrong("has no projector, which pretraining needs")


def test_solo_learns_small_stem_is_another_network(tmp_path: Path) -> None:
    network = Authors()
    network.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=2, bias=False)
    torch.save({"state_dict": with_bias(network)}, tmp_path / "x")
    with pytest.raises(ValueError, match="stem_padding: 2 saved, 1 now"):
        continue_from(tmp_path / "x", SETTINGS | {"small_stem": True})


def test_a_resumed_optimizer_keeps_the_settings_of_its_run() -> None:
    """As --accept-changes promises; a checkpoint has those of the run that wrote it."""
    layer = nn.Linear(2, 2)
    optimizers = [
        LARS(parameter_groups(layer, decay), momentum=m, eta=m / 9)
        for decay, m in ((0.1, 0.9), (0.2, 0.8))
    ]
    layer(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert [group["weight_decay"] for group in optimizers[1].param_groups] == [0.2, 0.0]
    assert [group["momentum"] for group in optimizers[1].param_groups] == [0.8, 0.8]
    assert all(
        torch.equal(optimizers[0].state[p]["mu"], optimizers[1].state[p]["mu"])
        for p in layer.parameters()
    )


# ── train.py ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RUN = [
    *TINY,
    "--width",
    "64",
    "--projector",
    "24-24-16",
    "--epochs",
    "5",
    "--warmup-epochs",
    "1",
    "--log-steps",
    "1",
]


def test_train_goes_on_from_the_authors_checkpoint(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    """Forty photographs are five steps of eight an epoch; it is after four."""
    path, run = Theirs().save(tmp_path / "checkpoint.pth"), tmp_path / "run"
    arguments = ["--data", unlabelled, *RUN, "--run-folder", run]
    assert_refused(train(*arguments, "--continue-from", tmp_path / "absent.pth"), "absent.pth")
    assert not run.exists()
    status, text = train(*arguments, "--continue-from", path)
    assert status == 0, text
    assert f"starts with the weights in {path}" in text
    assert "resumed after step 20" in text
    assert logged_steps(run) == [20, 21, 22, 23, 24]
    assert math.isfinite(read_summary(run)["loss_first"])
    before = (run / "checkpoint.pt").read_bytes()
    assert_refused(
        train(*arguments, "--continue-from", path, "--projector", "8-8"), "24-24-16 saved, 8-8 now"
    )
    assert (run / "checkpoint.pt").read_bytes() == before, "a file that does not fit moves nothing"
    assert_refused(
        train(*arguments, "--continue-from", path, "--resume"), "--continue-from", "--resume"
    )
    status, text = train(*arguments, "--continue-from", path, "--resume-if-saved")
    assert status == 0, text
    assert "resumed after step 25" in text
    assert (
        safetensors.torch.load_file(run / "backbone.safetensors").keys()
        == Theirs(0).network.backbone.state_dict().keys()
    )


def test_a_dry_run_does_not_continue() -> None:
    with pytest.raises(ValueError, match="--dry-run is given with --resume or --continue-from"):
        Pretrain(run=RunConfig(dry_run=True, continue_from=Path("x"))).check()
