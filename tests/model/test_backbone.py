"""The backbone, compared with torchvision's ResNets."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from model import BACKBONES, build_backbone
from tests.helpers.networks import make_views, randomize


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_backbone_is_torchvisions_without_its_classifier(name: str) -> None:
    ours = randomize(build_backbone(name))
    theirs = getattr(torchvision.models, name)(weights=None)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = nn.Identity()
    image = make_views(2, 64)[0]
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        assert torch.equal(ours(image), theirs(image))
    assert ours(image).shape == (2, ours.out_features)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_16_has_a_quarter_of_the_channels_everywhere(name: str) -> None:
    narrow = build_backbone(name, width=16)
    full = getattr(torchvision.models, name)(weights=None).state_dict()

    def quarter(shape: torch.Size) -> list[int]:
        """The first two dimensions are channels, except for the 3 of the image."""
        return [side if i > 1 or side == 3 else side // 4 for i, side in enumerate(shape)]

    expected = {n: quarter(v.shape) for n, v in full.items() if not n.startswith("fc.")}
    assert {n: list(v.shape) for n, v in narrow.state_dict().items()} == expected
    features = narrow(make_views(2, 32)[0])
    assert features.shape[1] == full["fc.weight"].shape[1] // 4


@pytest.mark.parametrize(("small_stem", "sides"), [(True, [32, 4]), (False, [8, 1])])
def test_the_small_stem_keeps_the_resolution_of_small_images(
    small_stem: bool, sides: list[int]
) -> None:
    network = build_backbone("resnet18", 16, small_stem)
    seen = []
    for stage in (network.layer1, network.layer4):
        stage.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    network(make_views(2, 32)[0])
    assert seen == sides
    kernel = 3 if small_stem else 7
    assert network.conv1.weight.shape == (16, 3, kernel, kernel)


@pytest.mark.parametrize(
    ("name", "small_stem"), [("resnet18", False), ("resnet50", False), ("resnet18", True)]
)
def test_residual_branches_start_at_zero(name: str, small_stem: bool) -> None:
    network = build_backbone(name, 16, small_stem)
    image = make_views(2, 64)[0]
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(image)))))
    assert torch.equal(network.layer1[1](x), x), "a fresh block is the identity"
    assert x.std() > 0


@pytest.mark.parametrize(
    ("name", "width", "message"), [("resnet7", 64, "resnet7.*resnet50"), ("resnet18", 0, "0")]
)
def test_impossible_backbones_are_refused(name: str, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, width)
