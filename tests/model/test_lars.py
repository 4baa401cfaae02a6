"""LARS beyond its formula (test_model.py): steps that it skips, scaled gradients, memory layouts, launches."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import LARS, BarlowTwins, build_backbone, parameter_groups
from tests.model.test_model import Tiny, lars_by_hand, randomised, views

LR, WD, ETA, MOMENTUM = 0.5, 0.1, 0.3, 0.8


def optimizer_of(model: nn.Module) -> LARS:
    return LARS(parameter_groups(model, WD), lr=LR, momentum=MOMENTUM, eta=ETA)


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
        if name not in ("unused", "frozen")
    }


def set_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, g in grads.items():
        model.get_parameter(name).grad = g.clone(memory_format=torch.preserve_format)


def contents(model: nn.Module, optimizer: LARS) -> list[Tensor]:
    momenta = [optimizer.state[p]["mu"] for p in model.parameters() if optimizer.state[p]]
    return [x.detach().clone() for x in (*model.parameters(), *momenta)]


class ByHand:
    """Weights and momenta of a model, one step after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.weights.items()}

    def step(self, grads: dict[str, Tensor]) -> None:
        for name, g in grads.items():
            p, mu = self.weights[name], self.momenta[name]
            self.weights[name], self.momenta[name] = lars_by_hand(
                p, g, mu, LR, WD, ETA, MOMENTUM, clip=False
            )

    def check(self, model: nn.Module, tolerance: float = 1e-12) -> None:
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), self.weights[name], rtol=tolerance, atol=tolerance / 100, msg=name
            )


# ── steps that are skipped ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("where", ["conv", "bias"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    bad: float, where: str, before: int
) -> None:
    model = Tiny()
    optimizer, expected = optimizer_of(model), ByHand(model)
    for seed in range(before):
        set_gradients(model, gradients(model, seed))
        optimizer.step()
        expected.step(gradients(model, seed))
        assert optimizer.skipped.item() == 0
    for row in (1, 2):
        grads = gradients(model, 10 + row)
        grads[where].view(-1)[1] = bad
        set_gradients(model, grads)
        then = contents(model, optimizer)
        optimizer.step()
        now = contents(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=False))  # momenta may be new
        assert all(not mu.any() for mu in now[len(then) :])
        assert (optimizer.skipped.item(), optimizer.skipped_steps.tolist()) == (1, [row, row])
    for seed in (20, 21):
        set_gradients(model, gradients(model, seed))
        optimizer.step()
        expected.step(gradients(model, seed))
        assert (optimizer.skipped.item(), optimizer.skipped_steps.tolist()) == (0, [2, 0])
    expected.check(model)
    set_gradients(model, {"linear": torch.full((4, 3), bad, dtype=torch.float64)})
    optimizer.step()
    assert optimizer.skipped_steps.tolist() == [3, 1]


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_grad_scaler_backs_off_and_its_scale_does_not_show_in_a_step(
    unscaled_before: bool,
) -> None:
    model = Tiny()
    optimizer, expected = optimizer_of(model), ByHand(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, factor in ((0, 1.0), (1, math.inf), (2, 1.0), (3, math.nan), (4, 1.0)):
        optimizer.zero_grad()
        grads = gradients(model, seed)
        loss = sum(
            (model.get_parameter(name) * g).sum() for name, g in grads.items()
        )  # of which they are the gradients
        scaler.scale(loss * factor).backward()
        if unscaled_before:
            scaler.unscale_(optimizer)
        then = contents(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            expected.step(grads)
            expected.check(model)
        else:
            assert all(
                torch.equal(a, b) for a, b in zip(contents(model, optimizer), then, strict=True)
            )
        assert optimizer.skipped.item() == (factor != 1)
    assert scaler.get_scale() == 2.0**8
    assert optimizer.skipped_steps.tolist() == [2, 0]


def test_a_network_in_float16_trains_once_the_scale_is_low_enough() -> None:
    network = randomised(
        BarlowTwins(build_backbone("resnet18", 8, small_stem=True), "16-16", 0.0051)
    )
    optimizer, scaler = optimizer_of(network), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    for skipped in range(24):
        then = contents(network, optimizer)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = network(*views(8, 16)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0 ** (24 - optimizer.skipped_steps[0].item())
        if not optimizer.skipped.item():
            break
        assert optimizer.skipped_steps.tolist() == [skipped + 1] * 2
        assert all(
            torch.equal(a, b) for a, b in zip(contents(network, optimizer), then, strict=False)
        )
    assert 0 < skipped < 23
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), then, strict=False))


# ── memory layouts ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "of_gradient", ["its parameter's", "contiguous", "channels last", "transposed"]
)
@pytest.mark.parametrize("of_parameter", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_momenta_may_lie_in_memory_otherwise_than_their_parameters(
    of_parameter: torch.memory_format, of_gradient: str
) -> None:
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(3, 5))
        .double()
        .to(memory_format=of_parameter)
    )
    optimizer, expected = optimizer_of(model), ByHand(model)

    def laid_out(name: str, x: Tensor) -> Tensor:
        if of_gradient == "its parameter's":
            return torch.empty_like(model.get_parameter(name)).copy_(x)
        if of_gradient == "transposed":
            return x.mT.contiguous().mT if x.ndim > 1 else x
        return (
            x.contiguous(memory_format=torch.channels_last)
            if of_gradient == "channels last" and x.ndim == 4
            else x
        )

    for seed in range(3):
        grads = {name: laid_out(name, g) for name, g in gradients(model, seed).items()}
        set_gradients(model, grads)
        optimizer.step()
        expected.step(grads)
        expected.check(model)
        state = copy.deepcopy(optimizer.state_dict())
        for key, of_one in state["state"].items():
            of_one["mu"] = laid_out([name for name, _ in _by_group(model)][key], of_one["mu"])
        optimizer.load_state_dict(state)  # as from the run of another layout


def _by_group(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """In the order in which the optimizer numbers them."""
    return sorted(model.named_parameters(), key=lambda item: item[1].ndim <= 1)


# ── launches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Calls(TorchDispatchMode):
    """Counts operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_a_few_list_operations_and_waits_for_nothing(scaled: bool) -> None:
    found = []
    for number in (10, 100):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(number // 2)))
        optimizer = optimizer_of(model)
        if scaled:
            optimizer.grad_scale = torch.tensor(2.0**16)  # type: ignore[attr-defined]  # as a GradScaler does
        for _ in range(2):  # momenta are made in the first
            set_gradients(model, gradients(model, 0))
            with Calls() as calls:
                optimizer.step()
        found.append(calls.counts)
    assert found[0] == found[1]
    assert found[0]["aten::_fused_sgd_"] == 2
    assert found[0].total() < 40
    assert not [
        name
        for name in found[0]
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")
    ]
