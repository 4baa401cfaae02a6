"""Pretraining continued from files of other projects, with the optimizer of the authors."""

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


class AuthorsNetwork(nn.Module):
    """The network of their main.py, with its parameters in the same order."""

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
                if p.norm() * g.norm() > 0:
                    g = g * 0.001 * p.norm() / g.norm()
            momenta[p] = 0.9 * momenta[p] + g if p in momenta else g
            p.data -= group["lr"] * momenta[p]


def gradients(parameters: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for p in parameters
    ]


class AuthorsRun:
    """Network and optimizer of the authors on `world` GPUs, after some steps."""

    def __init__(self, steps: int = 3, world: int = 1) -> None:
        torch.manual_seed(0)
        self.network = AuthorsNetwork()
        self.momenta: dict[Tensor, Tensor] = {}
        self.world = world
        parameters = list(self.network.parameters())
        weights = [p for p in parameters if not one_dimensional(p)]
        biases = [p for p in parameters if one_dimensional(p)]
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
        """Write their checkpoint.pth, with some entries changed."""
        parameters = [p for group in self.groups for p in group["params"]]
        numbers = iter(range(len(parameters)))
        saved = [
            {
                "lr": lr,
                "weight_decay": 1e-6,
                "momentum": 0.9,
                "eta": 0.001,
                "weight_decay_filter": one_dimensional,
                "lars_adaptation_filter": one_dimensional,
                "params": [next(numbers) for _ in group["params"]],
            }
            for lr, group in zip(self.lr, self.groups, strict=True)
        ]
        state = {number: {"mu": self.momenta[p]} for number, p in enumerate(parameters)}
        model = {f"module.{name}": value for name, value in self.network.state_dict().items()}
        content = {"epoch": 4, "model": model, "optimizer": {"state": state, "param_groups": saved}}
        torch.save(content | changed, path)
        return path


def resume_ours(
    saved: dict[str, Any], settings: dict[str, Any] = SETTINGS
) -> tuple[BarlowTwins, LARS, dict[str, Any]]:
    """Network and optimizer as train.py restores them, and the other entries of the state."""
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


@pytest.mark.parametrize(("world", "tolerance"), [(1, 1e-13), (32, 3e-7)])
def test_the_next_updates_equal_those_of_the_authors(
    world: int, tolerance: float, tmp_path: Path
) -> None:
    """On W GPUs, their gradient is 1/W of the true one, and their bias rate is W times ours.

    The tolerance is larger for W > 1, because momenta are multiplied by 1/W in float32.
    """
    theirs = AuthorsRun(world=world)
    # For weights, the factor 1/W cancels exactly only without weight decay.
    settings = SETTINGS | {"weight_decay": 0.0 if world > 1 else 1e-6}
    network, optimizer, rest = resume_ours(
        continue_from(theirs.save(tmp_path / "checkpoint.pth"), settings), settings
    )
    assert rest == {"step": 4 * 5}
    for p, q in zip(network.parameters(), theirs.network.parameters(), strict=True):
        assert torch.equal(p, q)
        # Further updates in float64.
        p.data = p.data.double()
        q.data = q.data.double()
        optimizer.state[p]["mu"] = optimizer.state[p]["mu"].double()
        theirs.momenta[q] = theirs.momenta[q].double()

    for seed, factor in ((10, 0.7), (11, 0.6)):
        theirs.step(seed, factor)
        our_step(network, optimizer, seed, (0.2 * factor, 0.0048 * factor))
        for (name, p), q in zip(
            network.named_parameters(), theirs.network.parameters(), strict=True
        ):
            torch.testing.assert_close(
                p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=name
            )


def test_another_bias_rate_does_not_change_the_length_of_the_next_step(tmp_path: Path) -> None:
    theirs = AuthorsRun()
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


def solo_learn_entries(network: AuthorsNetwork) -> dict[str, Tensor]:
    """With the biases of solo-learn's projector."""
    entries = {
        name: value for name, value in network.state_dict().items() if not name.startswith("bn.")
    }
    return entries | {f"projector.{i}.bias": torch.ones(n) for i, n in ((0, 24), (3, 24), (6, 16))}


@pytest.mark.parametrize(
    "content",
    [
        lambda network: {"state_dict": solo_learn_entries(network)},
        lambda network: {"model": network.state_dict()},
    ],
    ids=["solo-learn", "without an optimizer"],
)
def test_without_the_authors_optimizer_training_starts_at_step_0(
    content: Callable[[AuthorsNetwork], Any], tmp_path: Path
) -> None:
    theirs = AuthorsNetwork()
    torch.save(content(theirs), tmp_path / "x")
    network, optimizer, rest = resume_ours(continue_from(tmp_path / "x", SETTINGS))
    assert rest == {"step": 0}
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), theirs.parameters(), strict=True)
    )
    assert not optimizer.state_dict()["state"]


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    theirs, path = AuthorsRun(steps=1), tmp_path / "checkpoint.pth"
    good = theirs.save(path)

    def check_refused(words: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            continue_from(good, SETTINGS | changed)
        assert str(good) in str(caught.value)
        assert "\n" not in str(caught.value)

    check_refused("projector: 24-24-16 saved, 8192-8192-8192 now", projector="8192-8192-8192")
    check_refused("backbone: resnet18 saved, resnet50 now", backbone="resnet50")
    check_refused("width: 64 saved, 32 now", width=32)
    check_refused("has 4 finished epochs: --epochs must be greater than 4", epochs=4)
    optimizer = torch.load(path, weights_only=False)["optimizer"]
    for bad in (
        {},
        [1],
        optimizer | {"param_groups": optimizer["param_groups"][:1]},
        optimizer | {"state": {}},
    ):
        theirs.save(path, optimizer=bad)
        check_refused("does not contain the optimizer of the authors' main.py")
    backwards = dict(zip(optimizer["state"], reversed(optimizer["state"].values()), strict=True))
    theirs.save(path, optimizer=optimizer | {"state": backwards})
    check_refused("momentum has shape .*, parameter has shape")
    torch.save(theirs.network.backbone.state_dict(), path)
    check_refused("has no projector, which pretraining needs")


def test_the_small_stem_of_solo_learn_is_refused(tmp_path: Path) -> None:
    network = AuthorsNetwork()
    network.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=2, bias=False)
    torch.save({"state_dict": solo_learn_entries(network)}, tmp_path / "x")
    with pytest.raises(ValueError, match="stem_padding: 2 saved, 1 now"):
        continue_from(tmp_path / "x", SETTINGS | {"small_stem": True})


# ── train.py ──────────────────────────────────────────────────────────────────────────────────────

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


def test_train_continues_from_the_checkpoint_of_the_authors(
    train: Command, unlabelled: Path, tmp_path: Path
) -> None:
    """Forty images are five steps of eight per epoch; the checkpoint has four epochs."""
    path, run = AuthorsRun().save(tmp_path / "checkpoint.pth"), tmp_path / "run"
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
    assert (run / "checkpoint.pt").read_bytes() == before, "a refused file leaves the run unchanged"
    assert_refused(
        train(*arguments, "--continue-from", path, "--resume"), "--continue-from", "--resume"
    )
    status, text = train(*arguments, "--continue-from", path, "--resume-if-saved")
    assert status == 0, text
    assert "resumed after step 25" in text
    assert (
        safetensors.torch.load_file(run / "backbone.safetensors").keys()
        == AuthorsRun(0).network.backbone.state_dict().keys()
    )


def test_a_dry_run_refuses_to_continue() -> None:
    with pytest.raises(ValueError, match="--dry-run is given with --resume or --continue-from"):
        Pretrain(run=RunConfig(dry_run=True, continue_from=Path("x"))).check()
