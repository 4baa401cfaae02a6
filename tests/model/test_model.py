"""The network, its optimizer and schedule, and export, each beside torchvision, numpy or a short derivation."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from model import (
    BACKBONES,
    LARS,
    BarlowTwins,
    barlow_loss,
    build_backbone,
    choose_compilation,
    choose_precision,
    export_backbone,
    learning_rate_factor,
    normalize,
    parameter_groups,
)
from model.batch_norm import BatchNorm1d, BatchNorm2d


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every entry of its state different from what a fresh network has, zeros above all."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(
                0.5 + noise if value.ndim < 2 else (noise - 0.5) / math.sqrt(value[0].numel())
            )
        assert value.numel(), name
    return network


def views(
    batch: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, batch, 3, size, size, generator=generator, dtype=dtype)
    return a, 2 * b + 1


# ── backbone ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_are_as_many_as_published() -> None:
    with torch.device("meta"):
        network = BarlowTwins(build_backbone("resnet50"), "8192-8192-8192", 0.0051)
    assert sum(p.numel() for p in network.parameters()) == 174_535_744


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_backbone_is_torchvisions_without_its_classifier(name: str) -> None:
    ours = randomised(build_backbone(name))
    theirs = getattr(torchvision.models, name)(weights=None)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = nn.Identity()
    image = views(2, 64)[0]
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        assert torch.equal(ours(image), theirs(image))
    assert ours(image).shape == (2, ours.out_features)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_narrow_backbone_has_a_quarter_of_the_channels_everywhere(name: str) -> None:
    narrow = build_backbone(name, width=16).state_dict()
    full = getattr(torchvision.models, name)(weights=None).state_dict()
    assert {n: list(v.shape) for n, v in narrow.items()} == {
        n: [side if i > 1 or side == 3 else side // 4 for i, side in enumerate(v.shape)]
        for n, v in full.items()
        if not n.startswith("fc.")
    }
    assert (
        build_backbone(name, width=16)(views(2, 32)[0]).shape[1] == full["fc.weight"].shape[1] // 4
    )


def test_small_stem_keeps_the_resolution_of_small_images() -> None:
    stages = {}
    for small in (True, False):
        network, sides = build_backbone("resnet18", 16, small), []
        for stage in (network.layer1, network.layer4):
            stage.register_forward_hook(
                lambda module, given, out, sides=sides: sides.append(out.shape[-1])
            )
        network(views(2, 32)[0])
        stages[small] = sides
    assert stages == {True: [32, 4], False: [8, 1]}
    assert build_backbone("resnet18", 16, True).conv1.weight.shape == (16, 3, 3, 3)


@pytest.mark.parametrize(
    ("name", "small_stem"), [("resnet18", False), ("resnet50", False), ("resnet18", True)]
)
def test_residual_branches_start_at_zero(name: str, small_stem: bool) -> None:
    network = build_backbone(name, 16, small_stem)
    image = views(2, 64)[0]
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(image)))))
    assert torch.equal(network.layer1[1](x), x), "a fresh block passes on what it gets"
    assert x.std() > 0


@pytest.mark.parametrize(
    ("name", "width", "message"), [("resnet7", 64, "resnet7.*resnet50"), ("resnet18", 0, "0")]
)
def test_impossible_backbones_are_refused(name: str, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, width)


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_projector_is_linear_layers_with_batch_norm_and_relu_between() -> None:
    ours = randomised(BarlowTwins(build_backbone("resnet18", 8), "24-16-12", 0.0051).projector)
    theirs = nn.Sequential(
        *(nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU()),
        *(nn.Linear(24, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Linear(16, 12, bias=False),
    )
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(10, 64)
    assert torch.equal(ours(features), theirs(features))


@pytest.mark.parametrize("widths", ["", "8192-x", "64--64", "64-0", "-64", "6.5"])
def test_projectors_that_are_no_widths_are_refused(widths: str) -> None:
    with pytest.raises(ValueError, match=r"projector .*8192-8192-8192"):
        BarlowTwins(build_backbone("resnet18", 8), widths, 0.0051)


def test_each_view_has_its_own_batch_statistics() -> None:
    network = randomised(BarlowTwins(build_backbone("resnet18", 8), "32-32-32", 0.0051)).double()
    a, b = views(6, 32, dtype=torch.float64)
    apart, together = copy.deepcopy(network), copy.deepcopy(network)
    found = network(a, b)
    z_a, z_b = (apart.projector(apart.backbone(view)) for view in (a, b))
    expected = barlow_loss(normalize(z_a), normalize(z_b), 0.0051).loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    for (name, ours), theirs in zip(
        network.state_dict().items(), apart.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            ours, theirs, msg=name
        )  # running statistics: updated by a, then by b
    pooled = together.projector(together.backbone(torch.cat((a, b)))).chunk(2)
    assert abs(barlow_loss(*map(normalize, pooled), 0.0051).loss - expected) > 1e-3 * expected


def test_loss_scale_multiplies_the_loss_and_not_what_is_read() -> None:
    torch.manual_seed(0)
    network = BarlowTwins(build_backbone("resnet18", 8), "16-16", 0.0051).eval()
    plain = network(*views(4, 32))
    network.loss_scale = 0.25
    scaled = network(*views(4, 32))
    torch.testing.assert_close(scaled.loss, plain.loss / 4)
    torch.testing.assert_close(tuple(scaled.parts[1:]), tuple(plain.parts[1:]))


def test_precision_and_compilation_default_to_none_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_compilation("auto", cpu) == (None, "not compiled")


def test_a_machine_that_cannot_compile_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no C compiler\nin 40 lines")

    monkeypatch.setattr(torch, "compile", broken)
    mode, words = choose_compilation("default", torch.device("cpu"))
    assert mode is None
    assert "no C compiler" in words


# ── optimizer and schedule ───────────────────────────────────────────────────────────────────────────────────────────


class Tiny(nn.Module):
    """Weights, among them one that is zero and one whose gradient is; and parameters of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.linear, self.conv = parameter(4, 3), parameter(4, 3, 3, 3)
        self.bias, self.scalar = parameter(4), parameter()
        self.zero = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        self.unused = parameter(2, 2)
        self.no_gradient = parameter(2, 2)
        self.frozen = parameter(2, 2).requires_grad_(False)


def lars_by_hand(
    p: Tensor, g: Tensor, mu: Tensor, lr: float, wd: float, eta: float, momentum: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """protocols.md, section 1; with clip solo-learn's bound, which too leaves alone what has no norm."""
    if p.ndim > 1:
        g = g + wd * p
        if p.norm() > 0 and g.norm() > 0:
            rate = eta * float(p.norm()) / float(g.norm())
            g = g * (min(rate / lr if lr else math.inf, 1.0) if clip else rate)
    mu = momentum * mu + g
    return p - lr * mu, mu


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_lars_takes_the_steps_of_its_derivation(clip: bool, wd: float) -> None:
    model, eta, momentum = Tiny(), 0.5, 0.8
    optimizer = LARS(parameter_groups(model, wd), momentum=momentum, eta=eta, clip=clip)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for lr in (0.0, 4.0, 0.2, 1.0, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr if group["adapt"] else lr / 10
        for name, p in model.named_parameters():
            scale = 0.01 if name == "conv" else 1.0  # conv: bounded by clip, linear: not always
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if name in ("unused", "frozen"):
                p.grad = None
            elif name == "no_gradient":
                p.grad = torch.zeros_like(p)
        grads = {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        optimizer.step()
        for name, p in model.named_parameters():
            if (g := grads[name]) is not None:
                rate = lr if p.ndim > 1 else lr / 10
                expected[name], momenta[name] = lars_by_hand(
                    expected[name], g, momenta[name], rate, wd, eta, momentum, clip
                )
            torch.testing.assert_close(
                p.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=f"{name} at lr {lr}"
            )
            assert p.grad is None or torch.equal(p.grad, grads[name]), (
                "gradients belong to the caller"
            )


def test_weights_decay_and_adapt_but_nothing_of_one_dimension_does() -> None:
    network = BarlowTwins(build_backbone("resnet18", 8), "16-16", 0.0051)
    weights, rest = parameter_groups(network, 0.3)
    kinds = {id(p): type(m) for m in network.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in weights["params"]} == {nn.Conv2d, nn.Linear}
    assert {kinds[id(p)] for p in rest["params"]} == {BatchNorm2d, BatchNorm1d}
    assert len(weights["params"]) + len(rest["params"]) == len(kinds)
    assert [(g["weight_decay"], g["adapt"]) for g in (weights, rest)] == [(0.3, True), (0.0, False)]


def authors_rate(step: int, max_steps: int, warmup_steps: int) -> float:
    """`adjust_learning_rate` of the authors' main.py, for a base rate of 1."""
    if step < warmup_steps:
        return step / warmup_steps
    step, max_steps = step - warmup_steps, max_steps - warmup_steps
    q = 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return 1.0 * q + 0.001 * (1 - q)


def test_schedule_is_the_authors() -> None:
    ours = [learning_rate_factor(step, 300, 30) for step in range(300)]
    assert ours == pytest.approx([authors_rate(step, 300, 30) for step in range(300)], rel=1e-12)


def test_schedule_warms_up_to_its_peak_and_falls_to_its_end() -> None:
    def rate(step: int) -> float:
        return learning_rate_factor(step, 110, 10, start=0.2, end=0.1)

    by_hand = {0: 0.2, 5: 0.6, 10: 1.0, 35: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 60: 0.55, 110: 0.1}
    assert {step: rate(step) for step in by_hand} == pytest.approx(by_hand)
    rates = [rate(step) for step in range(111)]
    assert all(before < after for before, after in itertools.pairwise(rates[:11]))
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))


def test_schedule_without_warm_up_starts_at_its_peak_and_a_short_run_stays_in_warm_up() -> None:
    assert learning_rate_factor(0, 5, 0, start=0.5) == 1
    assert [learning_rate_factor(step, 2, 4) for step in range(2)] == [0, 0.25]


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exported_weights_load_into_torchvision(tmp_path: Path) -> None:
    backbone = randomised(build_backbone("resnet18")).to(memory_format=torch.channels_last)
    path = export_backbone(backbone, tmp_path)
    assert path == tmp_path / "backbone.safetensors"
    for weights in (
        safetensors.torch.load_file(path),
        torch.load(tmp_path / "backbone.pth", weights_only=True),
    ):
        theirs = torchvision.models.resnet18(weights=None)
        theirs.fc = nn.Identity()
        theirs.load_state_dict(weights)
        assert all(
            torch.equal(theirs.state_dict()[name], value)
            for name, value in backbone.state_dict().items()
        )
        assert all(value.is_contiguous() for value in weights.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone.pth", "backbone.safetensors"]
