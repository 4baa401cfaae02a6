"""The networks of other projects, with the names that their checkpoints have.

Modules of the project itself if it is installed, else rebuilt from its source.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from tests.helpers.libraries import import_or_skip

Module = TypeVar("Module", bound=nn.Module)

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
FEATURES = 512  # of a ResNet-18
CLASSES = 5
PROJECTOR = (24, 20, 16)  # widths, all different


def randomize_for_eval(module: Module) -> Module:
    """Set biases, scales and averages to random values, none of them 0 or 1; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3, generator=generator)
                m.running_var.uniform_(0.5, 2, generator=generator)
                m.num_batches_tracked.fill_(7)
                if m.affine:
                    m.weight.uniform_(0.3, 0.6, generator=generator)
                    m.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(m, nn.Linear) and m.bias is not None:
                m.bias.normal_(0, 0.5, generator=generator)
    return module.eval()


def state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def assert_same_entries(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class ProjectNetwork(nn.Module):
    """A network with given attributes.

    Args:
        features: Name of the submodule from images to features.
        embed: Name of the projector, from features to embeddings; "" for none.
        classify: Name of the classifier, from features to scores; "" for none.
        children: The attributes.
    """

    def __init__(
        self, features: str, embed: str = "", classify: str = "", **children: nn.Module
    ) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self._features = features
        self._embed = embed
        self._classify = classify

    def compute_features(self, images: Tensor) -> Tensor:
        return self.get_submodule(self._features)(images).flatten(1)

    def get_projector(self) -> nn.Module | None:
        return self.get_submodule(self._embed) if self._embed else None

    def get_classifier(self) -> nn.Module | None:
        return self.get_submodule(self._classify) if self._classify else None


def resnet18() -> Any:
    network = torchvision.models.resnet18(zero_init_residual=False)
    network.fc = nn.Identity()
    return network


def projector_layers(bias: bool, widths: tuple[int, ...] = PROJECTOR) -> list[nn.Module]:
    sizes = (FEATURES, *widths)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=bias), nn.BatchNorm1d(after), nn.ReLU()]
    return [*layers, nn.Linear(sizes[-2], sizes[-1], bias=bias)]


class MMPretrainNeck(nn.Module):
    """NonLinearNeck: the names of its layers, and their order in `forward`."""

    def __init__(self, widths: tuple[int, ...] = PROJECTOR) -> None:
        super().__init__()
        self.fc0, self.bn0, _, self.fc1, self.bn1, _, self.fc2 = projector_layers(False, widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.fc0(x)).relu()
        x = self.bn1(self.fc1(x)).relu()
        return self.fc2(x)


class VisslTrunk(nn.Module):
    """Files have its `_feature_blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self._feature_blocks = resnet18()

    def forward(self, x: Tensor) -> Tensor:
        return self._feature_blocks(x)


def authors() -> ProjectNetwork:
    return ProjectNetwork(
        "backbone",
        "projector",
        backbone=resnet18(),
        projector=nn.Sequential(*projector_layers(False)),
        bn=nn.BatchNorm1d(PROJECTOR[-1], affine=False),
    )


def mmpretrain(widths: tuple[int, ...] = PROJECTOR) -> ProjectNetwork:
    return ProjectNetwork(
        "backbone",
        "neck",
        backbone=resnet18(),
        neck=MMPretrainNeck(widths),
        head=nn.ModuleDict({"bn": nn.BatchNorm1d(widths[-1], affine=False)}),
        data_preprocessor=nn.BatchNorm2d(3),
    )


def mmpretrain_linear() -> ProjectNetwork:
    head = nn.ModuleDict({"fc": nn.Linear(FEATURES, CLASSES)})
    return ProjectNetwork("backbone", "", "head.fc", backbone=resnet18(), head=head)


def solo_learn(backbone: str = "backbone", widths: tuple[int, ...] = PROJECTOR) -> ProjectNetwork:
    children = {
        backbone: resnet18(),
        "projector": nn.Sequential(*projector_layers(True, widths)),
        "classifier": nn.Linear(FEATURES, CLASSES),
    }
    return ProjectNetwork(backbone, "projector", "classifier", **children)


def solo_learn_old() -> ProjectNetwork:
    return solo_learn("encoder")


def solo_learn_momentum() -> ProjectNetwork:
    network = solo_learn()
    network.momentum_backbone = resnet18()
    network.momentum_classifier = nn.Linear(FEATURES, CLASSES)
    return network


def _lightly_head() -> Any:
    heads = import_or_skip("lightly.models.modules.heads")
    return heads.BarlowTwinsProjectionHead(FEATURES, 20, 16)


def lightly() -> ProjectNetwork:
    """benchmarks/imagenet/resnet50/barlowtwins.py"""
    classifier = nn.ModuleDict({"classification_head": nn.Linear(FEATURES, CLASSES)})
    return ProjectNetwork(
        "backbone",
        "projection_head",
        "online_classifier.classification_head",
        backbone=resnet18(),
        projection_head=_lightly_head(),
        online_classifier=classifier,
    )


def lightly_sequential() -> ProjectNetwork:
    """examples/pytorch/barlowtwins.py"""
    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    return ProjectNetwork(
        "backbone", "projection_head", backbone=backbone, projection_head=_lightly_head()
    )


def lightly_linear() -> ProjectNetwork:
    """lightly/utils/benchmarking/linear_classifier.py"""
    return ProjectNetwork(
        "model.backbone",
        "model.projection_head",
        "classification_head",
        model=lightly(),
        classification_head=nn.Linear(FEATURES, CLASSES),
    )


def timm() -> ProjectNetwork:
    network = import_or_skip("timm").create_model("resnet18", num_classes=CLASSES)
    head = network.fc
    network.fc = nn.Identity()
    return ProjectNetwork("network", "", "head", network=network, head=head)


def vissl() -> ProjectNetwork:
    return ProjectNetwork("trunk", trunk=VisslTrunk())


def torchvision_resnet() -> ProjectNetwork:
    return ProjectNetwork("network", network=resnet18())


class Detectron2ResNet18(nn.Module):
    """Convolutions that own their norm, a stem, and the stages res2 to res5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": self._conv(3, 64, 7, 2)})
        self.res2 = self._stage(64, 64, 1)
        self.res3 = self._stage(64, 128, 2)
        self.res4 = self._stage(128, 256, 2)
        self.res5 = self._stage(256, 512, 2)

    @staticmethod
    def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        conv.norm = nn.BatchNorm2d(after)
        return conv

    def _stage(self, before: int, after: int, stride: int) -> nn.ModuleList:
        return nn.ModuleList([self._block(before, after, stride), self._block(after, after, 1)])

    def _block(self, before: int, after: int, stride: int) -> nn.ModuleDict:
        block = nn.ModuleDict(
            {"conv1": self._conv(before, after, 3, stride), "conv2": self._conv(after, after, 3, 1)}
        )
        if before != after:
            block["shortcut"] = self._conv(before, after, 1, stride)
        return block

    def forward(self, x: Tensor) -> Tensor:
        def apply(conv: Any, x: Tensor) -> Tensor:
            return conv.norm(conv(x))

        x = nn.functional.max_pool2d(apply(self.stem["conv1"], x).relu(), 3, 2, 1)
        for stage in (self.res2, self.res3, self.res4, self.res5):
            for block in stage:
                shortcut = apply(block["shortcut"], x) if "shortcut" in block else x
                inner = apply(block["conv1"], x).relu()
                x = (apply(block["conv2"], inner) + shortcut).relu()
        return x.mean((2, 3))
