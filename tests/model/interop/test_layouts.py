"""Weights in other projects' layouts: the modules that write and read them, theirs or rebuilt, compute the same."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from model import (
    BACKBONES,
    EXPORTS,
    BarlowTwins,
    Weights,
    build_backbone,
    export,
    export_backbone,
    load_backbone,
    read_weights,
    save_checkpoint,
)
from model.barlow_twins import build_projector
from tests.helpers.libraries import needed

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """With weights and statistics that all matter, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
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


def resnet18(**options: Any) -> Any:
    network = torchvision.models.resnet18(zero_init_residual=False, **options)
    network.fc = nn.Identity()
    return network


def mlp(bias: bool, sizes: tuple[int, ...] = (512, 24, 20, 16)) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=bias), nn.BatchNorm1d(after), nn.ReLU()]
    return [*layers, nn.Linear(sizes[-2], sizes[-1], bias=bias)]


class Named(nn.Module):
    """A module with these attributes, and which of them make features, embeddings and scores."""

    def __init__(
        self, features: str, embed: str = "", classify: str = "", **children: nn.Module
    ) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.names = {"features": features, "embed": embed, "classify": classify}

    def compute(self, what: str, x: Tensor) -> Tensor:
        return self.get_submodule(self.names[what])(x).flatten(1)


class Neck(nn.Module):
    """mmpretrain's NonLinearNeck: names of its layers, and their order in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, _, _, self.fc1, _, _, self.fc2 = mlp(bias=False)
        self.bn0, self.bn1 = nn.BatchNorm1d(24), nn.BatchNorm1d(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn1(self.fc1(self.bn0(self.fc0(x)).relu())).relu())


class Trunk(nn.Module):
    """VISSL's, of which the file keeps `_feature_blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self._feature_blocks = resnet18()

    def forward(self, x: Tensor) -> Tensor:
        return self._feature_blocks(x)


def authors() -> Named:
    bn = nn.BatchNorm1d(16, affine=False)
    return Named(
        "backbone", "projector", backbone=resnet18(), projector=nn.Sequential(*mlp(False)), bn=bn
    )


def mmpretrain() -> Named:
    head = nn.ModuleDict({"bn": nn.BatchNorm1d(16, affine=False)})
    module = Named("backbone", "neck", backbone=resnet18(), neck=Neck(), head=head)
    module.data_preprocessor = nn.BatchNorm2d(3)
    return module


def mmpretrain_linear() -> Named:
    return Named(
        "backbone",
        "",
        "head.fc",
        backbone=resnet18(),
        head=nn.ModuleDict({"fc": nn.Linear(512, 5)}),
    )


def solo_learn(backbone: str = "backbone") -> Named:
    children = {
        backbone: resnet18(),
        "projector": nn.Sequential(*mlp(True)),
        "classifier": nn.Linear(512, 5),
    }
    return Named(backbone, "projector", "classifier", **children)


def solo_learn_momentum() -> Named:
    module = solo_learn()
    module.momentum_backbone, module.momentum_classifier = resnet18(), nn.Linear(512, 5)
    return module


def lightly_heads() -> Any:
    return needed("lightly.models.modules.heads").BarlowTwinsProjectionHead(512, 20, 16)


def lightly() -> Named:
    """benchmarks/imagenet/resnet50/barlowtwins.py"""
    online = nn.ModuleDict({"classification_head": nn.Linear(512, 5)})
    children = {
        "backbone": resnet18(),
        "projection_head": lightly_heads(),
        "online_classifier": online,
    }
    return Named("backbone", "projection_head", "online_classifier.classification_head", **children)


def lightly_sequential() -> Named:
    """examples/pytorch/barlowtwins.py"""
    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    return Named("backbone", "projection_head", backbone=backbone, projection_head=lightly_heads())


def lightly_linear() -> Named:
    """lightly/utils/benchmarking/linear_classifier.py"""
    head = nn.Linear(512, 5)
    return Named(
        "model.backbone",
        "model.projection_head",
        "classification_head",
        model=lightly(),
        classification_head=head,
    )


def timm() -> Named:
    network = needed("timm").create_model("resnet18", num_classes=5)
    head, network.fc = network.fc, nn.Identity()
    return Named("network", "", "head", network=network, head=head)


def vissl() -> Named:
    return Named("trunk", trunk=Trunk())


def torchvision_resnet() -> Named:
    return Named("network", network=resnet18())


def state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def without_counts(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if "num_batches" not in name}


FILES: dict[str, tuple[str, Callable[[], Named], Callable[[Named], Any]]] = {
    "resnet50.pth": ("torchvision", torchvision_resnet, lambda m: state(m.network)),
    "checkpoint.pth": (
        "barlowtwins",
        authors,
        lambda m: {"epoch": 3, "model": state(m, "module."), "optimizer": {}},
    ),
    "mmpretrain": ("mmpretrain", mmpretrain, lambda m: {"meta": {}, "state_dict": state(m)}),
    "mmpretrain linear": (
        "mmpretrain",
        mmpretrain_linear,
        lambda m: {"meta": {"dataset_meta": {"classes": tuple("abcde")}}, "state_dict": state(m)},
    ),
    "solo-learn": ("solo-learn", solo_learn, lambda m: {"state_dict": state(m), "epoch": 99}),
    "solo-learn, old": (
        "solo-learn",
        lambda: solo_learn("encoder"),
        lambda m: {"state_dict": state(m)},
    ),
    "solo-learn, momentum": ("solo-learn", solo_learn_momentum, lambda m: {"state_dict": state(m)}),
    "lightly": ("lightly", lightly, lambda m: {"state_dict": state(m)}),
    "lightly, compiled": (
        "lightly",
        lightly,
        lambda m: {"state_dict": state(m, "_orig_mod.module.")},
    ),
    "lightly, sequential": ("lightly", lightly_sequential, state),
    "lightly, linear": ("lightly", lightly_linear, lambda m: {"state_dict": state(m)}),
    "VISSL": (
        "vissl",
        vissl,
        lambda m: {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": without_counts(state(m.trunk)), "heads": {}}}
            }
        },
    ),
    "timm": (
        "torchvision",
        timm,
        lambda m: state(m.network) | {f"fc.{k}": v for k, v in state(m.head).items()},
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "torch") for name in FILES),
        *((name, "safetensors") for name in ("checkpoint.pth", "VISSL", "timm")),
    ],
)
def test_what_is_read_computes_what_the_projects_module_does(
    name: str, kind: str, tmp_path: Path
) -> None:
    layout, make, content_of = FILES[name]
    module, path = randomised(make()), tmp_path / "file"
    content = content_of(module)
    if kind == "safetensors":
        for wrapper in ("state_dict", "model", "classy_state_dict", "base_model", "model", "trunk"):
            content = content.get(wrapper, content)
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    weights = read_weights(path)
    assert weights.layout == layout
    assert weights.classes == (list("abcde") if name == "mmpretrain linear" else [])
    assert (bool(weights.projector), bool(weights.head)) == tuple(
        bool(module.names[x]) for x in ("embed", "classify")
    )
    with torch.no_grad():
        features = module.compute("features", IMAGES)
        torch.testing.assert_close(load_backbone(weights, path)(IMAGES), features)
        if weights.projector:
            linear = [
                m
                for m in module.get_submodule(module.names["embed"]).modules()
                if isinstance(m, nn.Linear)
            ]
            projector = build_projector(
                512, "-".join(str(layer.out_features) for layer in linear)
            ).eval()
            projector.load_state_dict(weights.projector)
            dropped = 0 if linear[-1].bias is None else linear[-1].bias
            torch.testing.assert_close(
                projector(features), module.compute("embed", features) - dropped
            )
        if weights.head:
            scores = nn.functional.linear(features, weights.head["weight"], weights.head["bias"])
            torch.testing.assert_close(scores, module.compute("classify", features))


# ── exports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ours() -> Weights:
    network = randomised(BarlowTwins(build_backbone("resnet18"), "20-20-16", 0.005))
    head = {"weight": torch.randn(5, 512), "bias": torch.randn(5)}
    backbone, projector = network.backbone.state_dict(), network.projector.state_dict()
    return Weights("twinfeed", backbone, projector, head, list("vwxyz"), 48)


def embed(weights: Weights, features: Tensor) -> Tensor:
    projector = build_projector(512, "20-20-16").eval()
    projector.load_state_dict(weights.projector)
    return projector(features)


class Detectron(nn.Module):
    """detectron2's ResNet-18: convolutions that own their norm, a stem, and stages res2 to res5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": self.conv(3, 64, 7, 2)})
        for stage in range(4):
            before, after, stride = 64 * 2 ** max(0, stage - 1), 64 * 2**stage, 1 + (stage > 0)
            blocks = [self.block(before, after, stride), self.block(after, after, 1)]
            self.add_module(f"res{stage + 2}", nn.ModuleList(blocks))

    @staticmethod
    def conv(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        conv.norm = nn.BatchNorm2d(after)
        return conv

    def block(self, before: int, after: int, stride: int) -> nn.ModuleDict:
        shortcut = {"shortcut": self.conv(before, after, 1, stride)} if before != after else {}
        return nn.ModuleDict(
            {
                "conv1": self.conv(before, after, 3, stride),
                "conv2": self.conv(after, after, 3, 1),
                **shortcut,
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        def run(conv: Any, x: Tensor) -> Tensor:
            return conv.norm(conv(x))

        x = nn.functional.max_pool2d(run(self.stem["conv1"], x).relu(), 3, 2, 1)
        for stage in (self.res2, self.res3, self.res4, self.res5):
            for block in stage:
                inner = run(block["conv2"], run(block["conv1"], x).relu())
                x = (inner + (run(block["shortcut"], x) if "shortcut" in block else x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("layout", EXPORTS)
def test_an_export_loads_into_the_projects_module_and_comes_back(
    layout: str, ours: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pkl"
    export(ours, layout, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    features = load_backbone(ours, path)(IMAGES)
    embedded = embed(ours, features)
    scores = features @ ours.head["weight"].T + ours.head["bias"]
    if layout in ("torchvision", "timm", "safetensors"):
        whole = needed("timm").create_model("resnet18", num_classes=5) if layout == "timm" else None
        whole = whole or torchvision.models.resnet18(num_classes=5)
        content = (
            safetensors.torch.load_file(path)
            if layout == "safetensors"
            else torch.load(path, weights_only=True)
        )
        whole.load_state_dict(content)
        torch.testing.assert_close(whole.eval()(IMAGES), scores)
    elif layout == "detectron2":
        content = pickle.loads(path.read_bytes())
        assert content["matching_heuristics"] is True
        assert all(isinstance(value, np.ndarray) for value in content["model"].values())
        module = Detectron()
        module.load_state_dict(
            {name: torch.from_numpy(np.array(value)) for name, value in content["model"].items()}
        )
        torch.testing.assert_close(module.eval()(IMAGES), features)
        return
    else:
        content = torch.load(path, weights_only=True)["state_dict"]
        if layout == "mmpretrain":  # which keeps the two in files of two models
            module, linear = mmpretrain(), mmpretrain_linear()
            module.neck.fc0, module.neck.bn0, module.neck.fc1 = (
                nn.Linear(512, 20, False),
                nn.BatchNorm1d(20),
                nn.Linear(20, 20, False),
            )
            linear.load_state_dict({k: v for k, v in content.items() if not k.startswith("neck.")})
            torch.testing.assert_close(linear.eval().compute("classify", features), scores)
            missing, unexpected = module.load_state_dict(content, strict=False)
            assert {name.rpartition(".")[0] for name in missing} == {"head.bn", "data_preprocessor"}
            assert unexpected == ["head.fc.weight", "head.fc.bias"]
            assert torch.load(path, weights_only=True)["meta"] == {
                "dataset_meta": {"classes": list("vwxyz")}
            }
        else:
            module = {"solo-learn": solo_learn, "lightly": lightly}[layout]()
            if layout == "solo-learn":
                module.projector = nn.Sequential(*mlp(True, (512, 20, 20, 16)))
            module.load_state_dict(content)
            torch.testing.assert_close(module.eval().compute("classify", features), scores)
        torch.testing.assert_close(module.eval().compute("features", IMAGES), features)
        torch.testing.assert_close(module.compute("embed", features), embedded)
    back = read_weights(path)
    same(back.backbone, ours.backbone)
    same(back.projector, {} if layout in ("torchvision", "timm", "safetensors") else ours.projector)
    same(back.head, ours.head)
    known = layout in ("safetensors", "mmpretrain")
    assert (back.classes, back.size) == (
        list("vwxyz") if known else [],
        48 if layout == "safetensors" else None,
    )


def test_a_resnet50_has_the_names_of_timm_and_of_detectron2(tmp_path: Path) -> None:
    theirs = randomised(needed("timm").create_model("resnet50", num_classes=3))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    weights = read_weights(tmp_path / "timm.pth")
    scores = nn.functional.linear(load_backbone(weights, tmp_path)(IMAGES), **weights.head)
    torch.testing.assert_close(scores, theirs(IMAGES))
    export(weights, "timm", tmp_path / "again.pth")
    same(torch.load(tmp_path / "again.pth", weights_only=True), theirs.state_dict())
    export(weights, "detectron2", tmp_path / "R-50.pkl")
    entries = pickle.loads((tmp_path / "R-50.pkl").read_bytes())["model"]
    assert len(entries) == len(weights.backbone) == 318
    for name, origin in {  # as its R-50.pkl has them
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.norm.weight": "layer1.0.bn1.weight",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res5.2.conv3.weight": "layer4.2.conv3.weight",
        "res5.2.conv3.norm.running_mean": "layer4.2.bn3.running_mean",
    }.items():
        np.testing.assert_array_equal(entries[name], weights.backbone[origin])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_architecture_is_found_by_names_and_shapes(
    name: str, small_stem: bool, tmp_path: Path
) -> None:
    backbone = randomised(build_backbone(name, 4, small_stem))
    path = export_backbone(backbone, tmp_path, size=32)
    for file in (path, tmp_path / "backbone.pth"):
        weights = read_weights(file)
        assert weights.size == (32 if file == path else None)
        torch.testing.assert_close(
            load_backbone(weights, file)(IMAGES), backbone(IMAGES), rtol=0, atol=0
        )
    same(read_weights(path).backbone, backbone.state_dict())


def test_a_run_of_ours_is_read_from_its_folder_and_its_file(tmp_path: Path) -> None:
    network = randomised(BarlowTwins(build_backbone("resnet50", 4), "16-16", 0.005))
    settings = {"size": 40, "backbone": "resnet50"}
    save_checkpoint(
        tmp_path / "checkpoint.pt", {"step": 3, "model": network.state_dict(), "settings": settings}
    )
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        weights = read_weights(path)
        assert (weights.layout, weights.size, weights.head) == ("twinfeed", 40, {})
        same(weights.backbone, network.backbone.state_dict())
        same(weights.projector, network.projector.state_dict())


def test_solo_learns_small_stem_adds_a_wider_border(tmp_path: Path) -> None:
    module = solo_learn()
    module.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    module.backbone.maxpool = nn.Identity()
    randomised(module)
    torch.save({"state_dict": state(module)}, tmp_path / "x.ckpt")
    weights = read_weights(tmp_path / "x.ckpt")
    images = IMAGES[..., :32, :32]
    export(weights, "safetensors", tmp_path / "x.safetensors")
    export(weights, "solo-learn", tmp_path / "y.ckpt")
    for path in (tmp_path / "x.ckpt", tmp_path / "x.safetensors", tmp_path / "y.ckpt"):
        torch.testing.assert_close(
            load_backbone(read_weights(path), path)(images), module.backbone(images)
        )
    with pytest.raises(ValueError, match=r"border of 2 pixels.*export them to safetensors"):
        export(weights, "torchvision", tmp_path / "z.pth")
    mine = Weights(
        "twinfeed", build_backbone("resnet18", 8, small_stem=True).state_dict(), {}, {}, [], 32
    )
    with pytest.raises(ValueError, match="border of 2 pixels"):
        export(mine, "solo-learn", tmp_path / "z.pth")
    export(mine, "lightly", tmp_path / "z.pth")
    assert load_backbone(read_weights(tmp_path / "z.pth"), tmp_path).conv1.padding == (1, 1)


def test_names_without_classes_for_all_outputs_are_left_out(tmp_path: Path) -> None:
    """mmpretrain's pretraining checkpoints name the classes of the data, and have no classifier."""
    meta = {"dataset_meta": {"classes": list("abc")}}
    torch.save({"meta": meta, "state_dict": state(mmpretrain())}, tmp_path / "x")
    assert read_weights(tmp_path / "x").classes == []


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    torch.save(
        {
            name: value.half() if value.is_floating_point() else value
            for name, value in state(resnet18()).items()
        },
        tmp_path / "x",
    )
    assert {v.dtype for v in read_weights(tmp_path / "x").backbone.values()} == {
        torch.float32,
        torch.int64,
    }


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def refused(path: Path, content: Any, *words: str) -> None:
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_weights(path)
    said = str(caught.value)
    assert "\n" not in said
    assert not [word for word in words if word not in said], said


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path) -> None:
    good, path = state(resnet18()), tmp_path / "x.pth"
    lacking = {name: value for name, value in good.items() if not name.startswith("layer3.1.bn")}
    refused(path, lacking, "resnet18", "torchvision", "10 missing (layer3.1.bn1.", ", ...)")
    refused(
        path,
        good | {"layer1.0.se.fc1.weight": torch.zeros(3)},
        "1 unexpected (layer1.0.se.fc1.weight)",
    )
    refused(path, good | {"bn1.bias": torch.zeros(3)}, "1 misshapen (bn1.bias [3] for [64])")
    refused(path, good | {"extra": "text"}, "1 unexpected (extra)")
    refused(path, good | {"fc.weight": torch.zeros(5, 512)}, "1 missing (fc.bias)")
    refused(
        path,
        good | {"fc.weight": torch.zeros(5, 100), "fc.bias": torch.zeros(5)},
        "fc.weight [5, 100] for [5, 512]",
    )
    mm = mmpretrain()
    entries = state(mm)
    del entries["neck.bn1.weight"]
    refused(path, {"state_dict": entries}, "mmpretrain", "1 missing (neck.bn1.weight)")
    refused(
        path,
        {"state_dict": state(mm) | {"neck.fc3.bias": torch.zeros(3)}},
        "1 unexpected (neck.fc3.bias)",
    )
    solo = state(solo_learn())
    solo["projector.0.bias"] = torch.zeros(3)
    refused(path, {"state_dict": solo}, "solo-learn", "1 unexpected (projector.0.bias)")
    twice = state(solo_learn()) | {"encoder.bn1.bias": torch.zeros(64)}
    refused(path, {"state_dict": twice}, "1 unexpected (encoder.bn1.bias)")
    refused(
        path,
        {"state_dict": state(solo_learn()) | {"queue": torch.zeros(2)}},
        "1 unexpected (queue)",
    )


def test_other_networks_are_no_resnet_of_ours(tmp_path: Path) -> None:
    path, knows = (
        tmp_path / "x.pth",
        "contains no ResNet that twinfeed knows (resnet18, resnet34, resnet50, resnet101)",
    )
    with torch.device("meta"):
        others = {
            "vit": torchvision.models.vit_b_16(),
            "resnet152": torchvision.models.resnet152(),
            "deep stem": needed("timm").create_model("resnet18d"),
        }
        wide = {
            "wide": torchvision.models.wide_resnet50_2(),
            "next": torchvision.models.resnext50_32x4d(),
        }
        squeezed = needed("timm").create_model("seresnet50")

    def small(module: nn.Module) -> dict[str, Tensor]:
        return {
            name: torch.empty((), dtype=v.dtype).expand(v.shape)
            for name, v in module.state_dict().items()
        }

    for module in others.values():
        refused(path, small(module), knows)
    for module in wide.values():
        refused(path, small(module), "resnet50", "misshapen (layer1.0.conv")
    refused(path, small(squeezed), "unexpected (layer1.0.se.fc1.weight")
    refused(path, {"state_dict": {}}, "has no weights by name")
    refused(path, [1, 2], "has no weights by name")
    refused(path, nn.Linear(2, 2), "has no weights by name")
    circle: dict[str, Any] = {}
    circle["model"] = circle
    refused(path, circle, "its entries are model")


def test_what_a_file_says_about_itself_may_be_anything(tmp_path: Path) -> None:
    good, path = state(resnet18()), tmp_path / "x"
    for about in (
        {"settings": "text", "meta": 3},
        {"settings": {"size": "x"}, "meta": {"CLASSES": 3}},
    ):
        torch.save({"model": good, **about}, path)
        weights = read_weights(path)
        assert (weights.size, weights.classes) == (None, [])
    for text in (json.dumps([1]), json.dumps({"layout": "unknown", "size": [], "classes": "abc"})):
        safetensors.torch.save_file(good, path, {"twinfeed": text})
        weights = read_weights(path)
        assert (weights.layout, weights.size, weights.classes) == ("torchvision", None, [])
    safetensors.torch.save_file(good, path, {"twinfeed": "{"})
    with pytest.raises(ValueError, match=f"{path}.*JSON"):
        read_weights(path)


def test_an_export_that_cannot_be_says_why_and_leaves_nothing(
    ours: Weights, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no layout 'caffe'.*torchvision, timm"):
        export(ours, "caffe", tmp_path / "x")
    with pytest.raises(ValueError, match=r"ends with \.pkl"):
        export(ours, "detectron2", tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_the_epochs_of_a_pretraining_are_known_where_a_file_says_them(tmp_path: Path) -> None:
    """The authors count those that are done; ours are the steps that are done."""
    weights = resnet18().state_dict()
    wrapped = {f"module.{name}": value for name, value in state(authors()).items()}
    backbone = {
        f"backbone.{name}": value for name, value in weights.items() if not name.startswith("fc.")
    }
    settings = {"images": 1000, "batch_size": 300, "epochs": 99, "size": 48}
    files: dict[str, tuple[dict[str, Any], int | None]] = {
        "authors.pth": ({"epoch": 7, "model": wrapped, "optimizer": {}}, 7),
        "ours.pt": ({"step": 14, "settings": settings, "model": backbone}, 4),
        "odd.pt": (
            {"step": 14, "settings": {"images": 3, "batch_size": "x"}, "model": backbone},
            None,
        ),
        "plain.pth": (weights, None),
    }
    for name, (content, epochs) in files.items():
        torch.save(content, tmp_path / name)
        assert read_weights(tmp_path / name).epochs == epochs, name
    export(read_weights(tmp_path / "ours.pt"), "safetensors", tmp_path / "ours.safetensors")
    assert read_weights(tmp_path / "ours.safetensors").epochs == 4
