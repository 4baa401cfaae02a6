"""Batch norm of two views in one batch, compared with torch's own in two passes.

Also of networks that recompute their activations. On several ranks: test_distributed.py.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.resnet import BasicBlock, Bottleneck

from model import BarlowTwins, build_backbone
from model.batch_norm import BatchNorm1d, BatchNorm2d, freeze_running_averages
from tests.helpers.networks import make_views, randomize

CHANNELS = 5


class Kind(NamedTuple):
    ours: type[BatchNorm1d | BatchNorm2d]
    torchs: type[nn.Module]
    shape: tuple[int, ...]  # of one view


KINDS = {
    "1d": Kind(BatchNorm1d, nn.BatchNorm1d, (8, CHANNELS)),
    "2d": Kind(BatchNorm2d, nn.BatchNorm2d, (6, CHANNELS, 4, 3)),
}


def make_batch(kind: str, seed: int, mean: float = 3.0, std: float = 2.0) -> Tensor:
    """Each channel has another mean and deviation."""
    shape = KINDS[kind].shape
    generator = torch.Generator().manual_seed(seed)
    factors = 1 + torch.arange(CHANNELS, dtype=torch.float64) / CHANNELS
    factors = factors.view(-1, *[1] * (len(shape) - 2))
    return (mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)) * factors


def make_layers(kind: str) -> tuple[BatchNorm1d | BatchNorm2d, nn.Module]:
    """Ours for two views, and torch's in float64, with the same parameters and averages."""
    ours = randomize(KINDS[kind].ours(CHANNELS))
    ours.views = 2
    torchs = randomize(KINDS[kind].torchs(CHANNELS)).double()
    return ours, torchs


Results = dict[str, Tensor]


def run_layer(layer: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> Results:
    """Outputs, gradients and buffers after forward and backward on each of the inputs."""
    inputs = [
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs
    ]
    outputs = [layer(x) for x in inputs]
    torch.autograd.backward(outputs, grads)
    return {
        **{name: p.grad for name, p in layer.named_parameters()},
        **dict(layer.named_buffers()),
        "output": torch.cat(outputs).detach(),
        "input": torch.cat([x.grad for x in inputs]),
    }


def check_close(results: Results, expected: Results, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(
            results[name],
            value.to(results[name].dtype),
            rtol=tolerance,
            atol=tolerance * largest,
            msg=name,
        )


def run_both(
    kind: str, dtype: torch.dtype, mean: float = 3.0, std: float = 2.0
) -> tuple[Results, Results]:
    """Ours in a dtype, with both views in one batch; and torch's in float64 in two passes.

    Both get the same numbers, which are rounded to the dtype.
    """
    ours, torchs = make_layers(kind)
    if dtype == torch.float64:
        ours.double()
    x = [make_batch(kind, seed, mean, std).to(dtype) for seed in (0, 1)]
    grad = [make_batch(kind, seed).to(dtype) for seed in (7, 8)]
    expected = run_layer(torchs, [view.double() for view in x], [view.double() for view in grad])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        results = run_layer(ours, [torch.cat(x)], [torch.cat(grad)])

    assert results["output"].dtype == results["input"].dtype == dtype
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    assert results["running_var"].dtype == results["weight"].dtype == parameter_dtype
    return results, expected


@pytest.mark.parametrize("kind", KINDS)
def test_two_views_in_one_batch_give_the_results_of_two_passes(kind: str) -> None:
    results, expected = run_both(kind, torch.float64)
    check_close(results, expected, 1e-12)
    assert results["num_batches_tracked"] == expected["num_batches_tracked"] == 2


@pytest.mark.parametrize(("mean", "std", "tolerance"), [(3.0, 2.0, 1e-6), (1000.0, 1.0, 4e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_accurate_even_if_the_mean_is_large(
    kind: str, mean: float, std: float, tolerance: float
) -> None:
    """A mean of 1000 deviations is known to 1e-7 of itself, which is 1e-4 of a deviation."""
    check_close(*run_both(kind, torch.float32, mean, std), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_half_precision_are_computed_in_float32(kind: str) -> None:
    results, expected = run_both(kind, torch.bfloat16, mean=30.0)
    for name in ("output", "input"):
        check_close({name: results.pop(name)}, {name: expected.pop(name)}, 2**-8)
    check_close(results, expected, 1e-5)


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_channels_last_is_preserved(train: bool, n_views: int) -> None:
    layer = BatchNorm2d(CHANNELS).train(train)
    layer.views = n_views
    x = torch.cat([make_batch("2d", seed).float() for seed in range(2)])
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode_and_names_are_torchs(kind: str) -> None:
    ours, torchs = make_layers(kind)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    x = torch.cat([make_batch(kind, seed) for seed in range(2)])
    assert torch.equal(ours.double().eval()(x), torchs.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("n_views", [1, 2])
def test_frozen_averages_do_not_change(n_views: int) -> None:
    layer = randomize(BatchNorm2d(CHANNELS))
    layer.views = n_views
    x = torch.cat([make_batch("2d", seed).float() for seed in range(2)])
    first, state = layer(x), copy.deepcopy(layer.state_dict())
    with freeze_running_averages():
        assert torch.equal(layer(x), first)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    layer(x)
    assert layer.num_batches_tracked == state["num_batches_tracked"] + n_views


# ── the whole network ────────────────────────────────────────────────────────────────────────────


def make_network(name: str, one_pass: bool, recompute: bool = False) -> BarlowTwins:
    backbone = build_backbone(name, 8, small_stem=True)
    network = randomize(BarlowTwins(backbone, "24-24-16", 0.0051, one_pass=one_pass))
    if recompute:
        network.backbone.recompute_activations()
    return network.double()


def run_network(network: BarlowTwins, steps: int = 1) -> Results:
    """The last loss, and gradients and buffers afterwards."""
    for step in range(steps):
        loss = network(*make_views(6, 16, step, torch.float64)).loss
        loss.backward()
    return {
        **{name: p.grad for name, p in network.named_parameters()},
        **dict(network.named_buffers()),
        "loss": loss.detach(),
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_one_pass_of_the_network_gives_the_results_of_two(name: str) -> None:
    one_pass = run_network(make_network(name, one_pass=True))
    two_passes = run_network(make_network(name, one_pass=False))
    check_close(one_pass, two_passes, 1e-10)


def count_bytes_kept_for_backward(network: BarlowTwins) -> int:
    """For the backbone, including the inputs of residual blocks; each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage()
        return x

    def keep_input(block: nn.Module, args: tuple[Tensor]) -> None:
        keep(*args)

    for block in network.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network.backbone(torch.cat(make_views(6, 16, dtype=torch.float64)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_recomputing_activations_saves_memory(name: str, one_pass: bool) -> None:
    kept = count_bytes_kept_for_backward(make_network(name, one_pass))
    recomputed = count_bytes_kept_for_backward(make_network(name, one_pass, recompute=True))
    assert recomputed < 0.35 * kept


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_recomputed_activations_give_the_same_bits(name: str, one_pass: bool) -> None:
    kept = run_network(make_network(name, one_pass))
    recomputed = run_network(make_network(name, one_pass, recompute=True))
    assert all(torch.equal(recomputed[key], value) for key, value in kept.items())


def make_one_block_network(one_pass: bool) -> BarlowTwins:
    """A network that compiles quickly."""
    network = make_network("resnet18", one_pass, recompute=True)
    backbone = network.backbone
    del backbone.layer1[1:], backbone.layer2[:], backbone.layer3[:], backbone.layer4[:]
    network.projector = randomize(nn.Sequential(nn.Linear(8, 16, bias=False))).double()
    return network


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_compiled_network_recomputes_in_one_graph_and_updates_averages_once(
    one_pass: bool,
) -> None:
    expected = run_network(make_one_block_network(one_pass), steps=2)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = make_one_block_network(one_pass)
    compiled.compile(backend=backend, fullgraph=True)
    check_close(run_network(compiled, steps=2), expected, 1e-12)
    assert backend.frame_count == 1
