"""The authors' step and ours are the same step."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from bench import reference_step
from bench.training_step import TrainingStep
from experiment import ModelConfig
from model import LARS, build_network, parameter_groups

CPU = torch.device("cpu")
TINY = ModelConfig("resnet18", 4, projector="16-16")


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_both_steps_lead_to_the_same_weights(backbone: str, one_pass: bool) -> None:
    """In float64, over two steps: momentum takes part in the second."""
    config = ModelConfig(backbone, 8, projector="32-32-24")  # type: ignore[arg-type]
    torch.manual_seed(0)
    theirs = reference_step.Network(config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)  # zero-initialised scales would hide the residuals
    ours = build_network(config, one_pass=one_pass).double()
    state = {name: v for name, v in theirs.state_dict().items() if not name.startswith("bn.")}
    ours.load_state_dict(state)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    views = [torch.randn(6, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    ours.to(memory_format=torch.channels_last)

    def our_loss(view_a: Tensor, view_b: Tensor) -> Tensor:
        return ours(view_a, view_b).loss

    their_optimizer = reference_step.LARS(parameter_groups(theirs, 1e-3), 0.3, 0.9, 0.01)
    our_optimizer = LARS(parameter_groups(ours, 1e-3), 0.3, 0.9, 0.01)
    their_step = TrainingStep(theirs, their_optimizer, CPU, torch.float64)
    our_step = TrainingStep(our_loss, our_optimizer, CPU, torch.float64)
    for _ in range(2):
        their_step(*views)
        our_step(*views)

    expected = {**dict(theirs.named_buffers()), **dict(theirs.named_parameters())}
    for name, value in chain(ours.named_parameters(), ours.named_buffers()):
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for name, value in ours.named_parameters():
        assert not torch.equal(value, before[name])


def test_their_network_has_torchs_layers_in_channels_first_order() -> None:
    network = reference_step.Network(TINY)
    batch_norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert {type(module) for module in batch_norms} == {nn.BatchNorm1d, nn.BatchNorm2d}
    assert all(p.is_contiguous() for p in network.parameters())


def test_their_loss_is_the_sum_over_all_elements() -> None:
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = 0.0
    for i in range(7):
        for j in range(7):
            c_ij = float(sum(a[n, i] * b[n, j] for n in range(5)) / 5)
            expected += (c_ij - 1) ** 2 if i == j else 0.3 * c_ij**2
    assert float(reference_step.loss(a, b, 0.3)) == pytest.approx(expected, rel=1e-12)
