"""LARS: formula, parameter groups, skipped steps, scaled gradients, memory layouts, launches."""

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
from model.batch_norm import BatchNorm1d, BatchNorm2d
from tests.helpers.networks import make_views, randomize
from tests.helpers.reference import LarsSettings, lars_step

LR = 0.5
SETTINGS = LarsSettings(weight_decay=0.1, eta=0.3, momentum=0.8)


class ParametersOfAllKinds(nn.Module):
    """Weights, one of them zero and one without a gradient; and one-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.linear = parameter(4, 3)
        self.conv = parameter(4, 3, 3, 3)
        self.bias = parameter(4)
        self.scalar = parameter()
        self.zero = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        self.unused = parameter(2, 2)
        self.zero_gradient = parameter(2, 2)
        self.frozen = parameter(2, 2).requires_grad_(False)


def make_optimizer(model: nn.Module, settings: LarsSettings = SETTINGS) -> LARS:
    groups = parameter_groups(model, settings.weight_decay)
    return LARS(groups, LR, momentum=settings.momentum, eta=settings.eta, clip=settings.clip)


def random_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
        if name not in ("unused", "frozen")
    }


def set_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, g in grads.items():
        model.get_parameter(name).grad = g.clone(memory_format=torch.preserve_format)


def copy_state(model: nn.Module, optimizer: LARS) -> list[Tensor]:
    """Parameters, and then those momenta that exist."""
    momenta = [optimizer.state[p]["mu"] for p in model.parameters() if optimizer.state[p]]
    return [x.detach().clone() for x in (*model.parameters(), *momenta)]


def all_equal(a: list[Tensor], b: list[Tensor], strict: bool = True) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=strict))


class Reference:
    """The parameters and momenta of a model, updated by the written-out formula."""

    def __init__(self, model: nn.Module, settings: LarsSettings = SETTINGS) -> None:
        self.settings = settings
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step(self, grads: dict[str, Tensor], lr: float = LR, lr_biases: float = LR) -> None:
        for name, g in grads.items():
            p, mu = self.parameters[name], self.momenta[name]
            rate = lr if p.ndim > 1 else lr_biases
            self.parameters[name], self.momenta[name] = lars_step(p, g, mu, rate, self.settings)

    def check(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), self.parameters[name], rtol=1e-12, atol=1e-14, msg=name
            )


# ── formula ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_follow_the_formula(clip: bool, weight_decay: float) -> None:
    model = ParametersOfAllKinds()
    settings = LarsSettings(weight_decay, eta=0.5, momentum=0.8, clip=clip)
    optimizer = make_optimizer(model, settings)
    reference = Reference(model, settings)
    for seed, lr in enumerate((0.0, 4.0, 0.2, 1.0, 0.1)):
        for group in optimizer.param_groups:
            group["lr"] = lr if group["adapt"] else lr / 10
        grads = random_gradients(model, seed)
        grads["conv"] *= 0.01  # always limited by clip; linear only sometimes
        grads["zero_gradient"].zero_()
        set_gradients(model, grads)

        optimizer.step()
        reference.step(grads, lr, lr / 10)
        reference.check(model)
        for name, g in grads.items():
            assert torch.equal(model.get_parameter(name).grad, g), "p.grad must not change"


def test_only_weights_decay_and_adapt() -> None:
    network = BarlowTwins(build_backbone("resnet18", 8), "16-16", 0.0051)
    weights, rest = parameter_groups(network, 0.3)
    layers = {id(p): type(m) for m in network.modules() for p in m.parameters(recurse=False)}
    assert {layers[id(p)] for p in weights["params"]} == {nn.Conv2d, nn.Linear}
    assert {layers[id(p)] for p in rest["params"]} == {BatchNorm2d, BatchNorm1d}
    assert len(weights["params"]) + len(rest["params"]) == len(layers)
    assert [(g["weight_decay"], g["adapt"]) for g in (weights, rest)] == [(0.3, True), (0.0, False)]


def test_a_loaded_state_does_not_replace_the_hyper_parameters() -> None:
    layer = nn.Linear(2, 2)
    old, new = (
        LARS(parameter_groups(layer, decay), momentum=momentum, eta=momentum / 9)
        for decay, momentum in ((0.1, 0.9), (0.2, 0.8))
    )
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    new.load_state_dict(old.state_dict())
    assert [group["weight_decay"] for group in new.param_groups] == [0.2, 0.0]
    assert [group["momentum"] for group in new.param_groups] == [0.8, 0.8]
    for p in layer.parameters():
        assert torch.equal(old.state[p]["mu"], new.state[p]["mu"])


# ── skipped steps ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("parameter", ["conv", "bias"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    bad: float, parameter: str, steps_before: int
) -> None:
    model = ParametersOfAllKinds()
    optimizer, reference = make_optimizer(model), Reference(model)
    for seed in range(steps_before):
        set_gradients(model, random_gradients(model, seed))
        optimizer.step()
        reference.step(random_gradients(model, seed))
        assert optimizer.skipped.item() == 0
    for in_a_row in (1, 2):
        grads = random_gradients(model, 10 + in_a_row)
        grads[parameter].view(-1)[1] = bad
        set_gradients(model, grads)
        before = copy_state(model, optimizer)
        optimizer.step()
        after = copy_state(model, optimizer)
        assert all_equal(before, after, strict=False)
        new_momenta = after[len(before) :]
        assert all(not mu.any() for mu in new_momenta)
        assert optimizer.skipped.item() == 1
        assert optimizer.skipped_steps.tolist() == [in_a_row, in_a_row]
    for seed in (20, 21):
        set_gradients(model, random_gradients(model, seed))
        optimizer.step()
        reference.step(random_gradients(model, seed))
        assert optimizer.skipped.item() == 0
        assert optimizer.skipped_steps.tolist() == [2, 0]
    reference.check(model)
    set_gradients(model, {"linear": torch.full((4, 3), bad, dtype=torch.float64)})
    optimizer.step()
    assert optimizer.skipped_steps.tolist() == [3, 1]


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_grad_scaler_backs_off_and_its_scale_does_not_change_the_step(
    unscaled_before: bool,
) -> None:
    model = ParametersOfAllKinds()
    optimizer, reference = make_optimizer(model), Reference(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, factor in ((0, 1.0), (1, math.inf), (2, 1.0), (3, math.nan), (4, 1.0)):
        optimizer.zero_grad()
        grads = random_gradients(model, seed)
        loss = sum((model.get_parameter(name) * g).sum() for name, g in grads.items())
        scaler.scale(loss * factor).backward()
        if unscaled_before:
            scaler.unscale_(optimizer)
        before = copy_state(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            reference.step(grads)
            reference.check(model)
        else:
            assert all_equal(before, copy_state(model, optimizer))
        assert optimizer.skipped.item() == (factor != 1)
    assert scaler.get_scale() == 2.0**8
    assert optimizer.skipped_steps.tolist() == [2, 0]


def test_a_network_in_float16_trains_once_the_scale_is_low_enough() -> None:
    backbone = build_backbone("resnet18", 8, small_stem=True)
    network = randomize(BarlowTwins(backbone, "16-16", 0.0051))
    optimizer = make_optimizer(network)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    for skipped in range(24):
        before = copy_state(network, optimizer)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = network(*make_views(8, 16)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0 ** (24 - optimizer.skipped_steps[0].item())
        if not optimizer.skipped.item():
            break
        assert optimizer.skipped_steps.tolist() == [skipped + 1] * 2
        assert all_equal(before, copy_state(network, optimizer), strict=False)
    assert 0 < skipped < 23
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=False))


# ── memory layouts ───────────────────────────────────────────────────────────────────────────────


def lay_out(x: Tensor, layout: str, parameter: Tensor) -> Tensor:
    if layout == "its parameter's":
        return torch.empty_like(parameter).copy_(x)
    if layout == "transposed" and x.ndim > 1:
        return x.mT.contiguous().mT
    if layout == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@pytest.mark.parametrize("layout", ["its parameter's", "contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("parameter_layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_momenta_may_have_other_memory_layouts_than_their_parameters(
    parameter_layout: torch.memory_format, layout: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(3, 5))
    model = model.double().to(memory_format=parameter_layout)
    # The optimizer numbers weights first.
    numbered = sorted(model.parameters(), key=lambda p: p.ndim <= 1)
    optimizer, reference = make_optimizer(model), Reference(model)
    for seed in range(3):
        grads = {
            name: lay_out(g, layout, model.get_parameter(name))
            for name, g in random_gradients(model, seed).items()
        }
        set_gradients(model, grads)
        optimizer.step()
        reference.step(grads)
        reference.check(model)
        state = copy.deepcopy(optimizer.state_dict())
        for number, parameter_state in state["state"].items():
            parameter_state["mu"] = lay_out(parameter_state["mu"], layout, numbered[number])
        optimizer.load_state_dict(state)  # as from a run with another layout


# ── kernel launches ──────────────────────────────────────────────────────────────────────────────


class CountedOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_a_few_list_operations_and_never_waits_for_the_device(scaled: bool) -> None:
    counts = []
    for parameter_count in (10, 100):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(parameter_count // 2)))
        optimizer = make_optimizer(model)
        if scaled:
            optimizer.grad_scale = torch.tensor(2.0**16)  # type: ignore[attr-defined]  # as a GradScaler does
        for _ in range(2):  # the first step creates the momenta
            set_gradients(model, random_gradients(model, 0))
            with CountedOperations() as operations:
                optimizer.step()
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert counts[0]["aten::_fused_sgd_"] == 2
    assert counts[0].total() < 40
    waiting = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"}
    assert not waiting & counts[0].keys()
