"""Batch norm of two views in one batch, beside torch's own in two passes; and activations that are computed again.

Over several ranks: test_ranks.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.resnet import BasicBlock, Bottleneck

from model import BarlowTwins, build_backbone
from model.batch_norm import BatchNorm1d, BatchNorm2d, freeze_running_averages
from tests.model.test_model import randomised, views

C = 5
KINDS = {
    "1d": (BatchNorm1d, nn.BatchNorm1d, (8, C)),
    "2d": (BatchNorm2d, nn.BatchNorm2d, (6, C, 4, 3)),
}


def batch(kind: str, view: int, mean: float = 3.0, std: float = 2.0) -> Tensor:
    """Another mean and deviation in each channel."""
    shape = KINDS[kind][2]
    generator = torch.Generator().manual_seed(view)
    by_channel = (1 + torch.arange(C, dtype=torch.float64) / C).view(-1, *[1] * (len(shape) - 2))
    return (mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)) * by_channel


def layers(kind: str) -> tuple[BatchNorm1d | BatchNorm2d, nn.Module]:
    ours, theirs = (randomised(layer(C)) for layer in KINDS[kind][:2])
    ours.views = 2
    return ours, theirs.double()


Results = dict[str, Tensor]


def results(layer: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> Results:
    """What comes of calls in sequence: with two views in one batch or with each of them."""
    inputs = [
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs
    ]
    outputs = [layer(x) for x in inputs]
    torch.autograd.backward(outputs, grads)
    found = {name: p.grad for name, p in layer.named_parameters()} | dict(layer.named_buffers())
    return found | {
        "output": torch.cat(outputs).detach(),
        "input": torch.cat([x.grad for x in inputs]),
    }


def check(found: Results, expected: Results, rtol: float, atol: float | None = None) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        of_this = rtol * float(value.abs().max()) if atol is None else atol
        torch.testing.assert_close(
            found[name], value.to(found[name].dtype), rtol=rtol, atol=of_this, msg=name
        )


def both(kind: str, dtype: torch.dtype, **moments: float) -> tuple[Results, Results]:
    """Ours, in that dtype, and torch's in float64 from the same rounded numbers."""
    ours, theirs = layers(kind)
    x, grad = (
        [batch(kind, view + 7 * g, **({} if g else moments)).to(dtype) for view in range(2)]
        for g in range(2)
    )
    if dtype == torch.float64:
        ours.double()
    expected = results(theirs, [view.double() for view in x], [view.double() for view in grad])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = results(ours, [torch.cat(x)], [torch.cat(grad)])
    assert found["output"].dtype == found["input"].dtype == dtype
    assert (
        found["running_var"].dtype
        == found["weight"].dtype
        == torch.promote_types(dtype, torch.float32)
    )
    return found, expected


@pytest.mark.parametrize("kind", KINDS)
def test_two_views_in_one_batch_are_two_passes(kind: str) -> None:
    found, expected = both(kind, torch.float64)
    check(found, expected, 1e-12)
    assert found["num_batches_tracked"] == expected["num_batches_tracked"] == 2


@pytest.mark.parametrize(("mean", "std", "tolerance"), [(3.0, 2.0, 1e-6), (1000.0, 1.0, 4e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits_even_where_the_mean_is_large(
    kind: str, mean: float, std: float, tolerance: float
) -> None:
    """A mean of 1000 deviations is known to 1e-7 of itself, which is 1e-4 of a deviation."""
    check(*both(kind, torch.float32, mean=mean, std=std), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_half_precision_are_taken_in_float32(kind: str) -> None:
    found, expected = both(kind, torch.bfloat16, mean=30.0)
    rounded = {name: found.pop(name) for name in ("output", "input")}
    check(rounded, {name: expected.pop(name) for name in rounded}, 2**-8)
    check(found, expected, 1e-5)


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_channels_last_stays(train: bool, n_views: int) -> None:
    layer = BatchNorm2d(C).train(train)
    layer.views = n_views
    x = torch.cat([batch("2d", view).float() for view in range(2)]).to(
        memory_format=torch.channels_last
    )
    y = layer(x.requires_grad_())
    y.backward(torch.ones_like(y))
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_torchs_and_so_are_the_names(kind: str) -> None:
    ours, theirs = layers(kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    x = torch.cat([batch(kind, view) for view in range(2)])
    assert torch.equal(ours.double().eval()(x), theirs.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("n_views", [1, 2])
def test_averages_stay_while_activations_are_computed_again(n_views: int) -> None:
    layer = randomised(BatchNorm2d(C))
    layer.views = n_views
    x = torch.cat([batch("2d", view).float() for view in range(2)])
    first, state = layer(x), copy.deepcopy(layer.state_dict())
    with freeze_running_averages():
        assert torch.equal(layer(x), first)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    layer(x)
    assert layer.num_batches_tracked == state["num_batches_tracked"] + n_views


# ── the whole network ────────────────────────────────────────────────────────────────────────────────────────────────


def network(name: str, one_pass: bool, recompute: bool = False) -> BarlowTwins:
    made = BarlowTwins(
        build_backbone(name, 8, small_stem=True), "24-24-16", 0.0051, one_pass=one_pass
    )
    if recompute:
        made.backbone.recompute_activations()
    assert isinstance(randomised(made), BarlowTwins)
    return made.double()


def trained(made: BarlowTwins, steps: int = 1) -> Results:
    """The last loss, gradients, and what the buffers are then."""
    for step in range(steps):
        loss = made(*views(6, 16, step, torch.float64)).loss
        loss.backward()
    found = {name: p.grad for name, p in made.named_parameters()} | dict(made.named_buffers())
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_one_pass_of_the_network_is_two(name: str) -> None:
    check(trained(network(name, one_pass=True)), trained(network(name, one_pass=False)), 1e-10)


def bytes_kept(made: BarlowTwins) -> int:
    """For the backward pass of its backbone, the inputs of residual blocks among them; each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage()
        return x

    def keep_input(block: nn.Module, given: tuple[Tensor]) -> None:
        keep(*given)

    for block in made.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made.backbone(torch.cat(views(6, 16, dtype=torch.float64)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_recomputed_activations_give_the_same_bits_and_are_not_kept(
    name: str, one_pass: bool
) -> None:
    plain, again = (network(name, one_pass, recompute) for recompute in (False, True))
    assert bytes_kept(again) < 0.35 * bytes_kept(plain)
    plain, again = (trained(network(name, one_pass, recompute)) for recompute in (False, True))
    assert all(torch.equal(again[key], value) for key, value in plain.items())


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_compiler_recomputes_in_one_graph_and_updates_the_averages_once(one_pass: bool) -> None:
    """Of a network of one residual block, for speed."""
    found, graphs = [], CompileCounterWithBackend("aot_eager")
    for traced in (False, True):
        made = network("resnet18", one_pass, recompute=True)
        del (
            made.backbone.layer1[1:],
            made.backbone.layer2[:],
            made.backbone.layer3[:],
            made.backbone.layer4[:],
        )
        made.projector = randomised(nn.Sequential(nn.Linear(8, 16, bias=False))).double()
        if traced:
            made.compile(backend=graphs, fullgraph=True)
        found.append(trained(made, steps=2))
    check(found[1], found[0], 1e-12)
    assert graphs.frame_count == 1
