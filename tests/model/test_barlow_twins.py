"""The network: its projector, the statistics of its views, its loss, and building it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from experiment.presets import ModelConfig
from model import BarlowTwins, barlow_loss, build_backbone, build_network, normalize
from tests.helpers.networks import make_views, randomize


def test_it_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = BarlowTwins(build_backbone("resnet50"), "8192-8192-8192", 0.0051)
    assert sum(p.numel() for p in network.parameters()) == 174_535_744


def test_a_network_is_built_from_its_configuration() -> None:
    config = ModelConfig(
        "resnet18", width=8, small_stem=True, projector="24-16", lambd=0.3, loss_scale=0.5
    )
    torch.manual_seed(0)
    ours = build_network(config, one_pass=True)
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", 8, small_stem=True)
    expected = BarlowTwins(backbone, "24-16", 0.3, loss_scale=0.5, one_pass=True)
    assert torch.equal(ours(*make_views(4, 16)).loss, expected(*make_views(4, 16)).loss)


def test_the_projector_is_linear_layers_with_batch_norm_and_relu_between() -> None:
    ours = randomize(BarlowTwins(build_backbone("resnet18", 8), "24-16-12", 0.0051).projector)
    theirs = nn.Sequential(
        nn.Linear(64, 24, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 12, bias=False),
    )
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(10, 64)
    assert torch.equal(ours(features), theirs(features))


@pytest.mark.parametrize("widths", ["", "8192-x", "64--64", "64-0", "-64", "6.5"])
def test_a_projector_without_valid_widths_is_refused(widths: str) -> None:
    with pytest.raises(ValueError, match=r"projector .*8192-8192-8192"):
        BarlowTwins(build_backbone("resnet18", 8), widths, 0.0051)


def test_each_view_has_its_own_batch_statistics() -> None:
    network = randomize(BarlowTwins(build_backbone("resnet18", 8), "32-32-32", 0.0051)).double()
    a, b = make_views(6, 32, dtype=torch.float64)
    separate, pooled = copy.deepcopy(network), copy.deepcopy(network)
    output = network(a, b)

    z_a, z_b = (separate.projector(separate.backbone(view)) for view in (a, b))
    expected = barlow_loss(normalize(z_a), normalize(z_b), 0.0051).loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    # Also the running averages: updated by view a, then by view b.
    for name, value in separate.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)

    z_a, z_b = pooled.projector(pooled.backbone(torch.cat((a, b)))).chunk(2)
    pooled_loss = barlow_loss(normalize(z_a), normalize(z_b), 0.0051).loss
    assert abs(pooled_loss - expected) > 1e-3 * expected


def test_loss_scale_multiplies_the_loss_but_not_its_readings() -> None:
    torch.manual_seed(0)
    network = BarlowTwins(build_backbone("resnet18", 8), "16-16", 0.0051).eval()
    plain = network(*make_views(4, 32))
    network.loss_scale = 0.25
    scaled = network(*make_views(4, 32))
    torch.testing.assert_close(scaled.loss, plain.loss / 4)
    torch.testing.assert_close(tuple(scaled.parts[1:]), tuple(plain.parts[1:]))
