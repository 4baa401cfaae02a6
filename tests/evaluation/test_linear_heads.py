"""Linear heads beside a plain loop after the authors' evaluate.py; sweeps, resume, and what must not move."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor, nn

import pipeline
from evaluation import Batches, Tuning, accuracies, train_heads
from model import build_backbone
from model.backbone import Backbone

CLASSES = 7


def backbone(width: int = 4, dtype: torch.dtype = torch.float64) -> Backbone:
    """With residual branches that are not zero, and batch-norm averages that are not those of a fresh network."""
    torch.manual_seed(3)
    network = build_backbone("resnet18", width)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("weight", "bias", "running_mean")):
                value.add_(0.1 * torch.randn(value.shape))
    return network.to(dtype)


def batches(
    epoch: int, dtype: torch.dtype = torch.float64, size: int = 16
) -> list[tuple[tuple[Tensor], Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    found = []
    for _ in range(3):
        labels = torch.randint(CLASSES, (8,), generator=generator)
        views = (
            torch.randn(8, 3, size, size, generator=generator, dtype=dtype)
            + labels[:, None, None, None] / 5
        )
        found.append(((views,), labels, torch.arange(8)))
    return found


def trained(network: Backbone, tuning: Tuning, **named: Any) -> list[nn.Linear]:
    named = {"seed": 5, "settings": {"data": "noise"}, "epoch_batches": batches} | named
    return train_heads(network, CLASSES, tuning, **named)


def authors_loop(network: Backbone, tuning: Tuning, head: tuple[float, float]) -> nn.Module:
    """evaluate.py of facebookresearch/barlowtwins on torchvision's network: `--weights freeze` or `finetune`."""
    model = torchvision.models.resnet18(num_classes=CLASSES).double()
    [start] = trained(copy.deepcopy(network), replace(tuning, epochs=0, heads=(head,)))
    model.load_state_dict(network.state_dict() | {"fc.weight": start.weight, "fc.bias": start.bias})
    finetune = tuning.backbone_lr is not None
    if not finetune:
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    groups = [{"params": model.fc.parameters(), "lr": head[0], "weight_decay": head[1]}]
    if finetune:
        rest = [
            value
            for name, value in model.named_parameters()
            if name not in {"fc.weight", "fc.bias"}
        ]
        groups.append({"params": rest, "lr": tuning.backbone_lr, "weight_decay": 0})
    optimizer = torch.optim.SGD(groups, 0, momentum=0.9)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if tuning.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(tuning.milestones), tuning.gamma
        )
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuning.epochs)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(tuning.epochs):
        model.train(finetune)
        for (images,), target, _ in batches(epoch):
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def bits(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("milestones", [None, (1, 3)])
def test_each_frozen_head_of_a_sweep_is_the_authors(milestones: tuple[int, ...] | None) -> None:
    network = backbone(64)
    tuning = Tuning(4, ((0.3, 1e-6), (0.03, 0.05), (0.3, 0.05)), milestones=milestones, gamma=0.2)
    heads = trained(copy.deepcopy(network), tuning)
    for settings, head in zip(tuning.heads, heads, strict=True):
        theirs = authors_loop(network, tuning, settings)
        close(head.weight, theirs.fc.weight)
        close(head.bias, theirs.fc.bias)
    assert not torch.allclose(heads[0].weight, heads[2].weight, rtol=1e-3), "weight decay counts"


@pytest.mark.parametrize("milestones", [None, (1, 2)])
def test_a_fine_tuned_network_is_the_authors(milestones: tuple[int, ...] | None) -> None:
    network = backbone(64)
    tuning = Tuning(3, ((0.05, 0.01),), backbone_lr=0.002, milestones=milestones, gamma=0.2)
    ours = copy.deepcopy(network)
    [head] = trained(ours, tuning)
    theirs = authors_loop(network, tuning, tuning.heads[0]).state_dict()
    for name, value in (
        ours.state_dict() | {f"fc.{name}": value for name, value in head.state_dict().items()}
    ).items():
        close(value, theirs[name])
    assert int(ours.bn1.num_batches_tracked) == 9, "its averages went along"


def test_a_sweep_gives_what_each_head_gives_alone() -> None:
    grid = ((0.3, 0.0), (3.0, 1e-3), (0.01, 0.1))
    together = trained(backbone(), Tuning(3, grid))
    for settings, head in zip(grid, together, strict=True):
        [alone] = trained(backbone(), Tuning(3, (settings,)))
        assert same(bits(head), bits(alone))


def test_heads_start_alike_from_small_weights() -> None:
    a, b = trained(backbone(64), Tuning(0, ((0.1, 0), (0.2, 0))))
    [other] = trained(backbone(64), Tuning(0, ((0.1, 0),)), seed=6)
    assert same(bits(a), bits(b))
    assert not same(bits(a), bits(other))
    weight = a.weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.05)  # 3584 weights
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    assert not a.bias.any()


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    network = backbone(dtype=torch.float32)
    losses = []
    wild, calm = trained(
        network,
        Tuning(2, ((1e38, 1.0), (0.1, 0.0))),
        epoch_batches=lambda epoch: batches(epoch, torch.float32),
        progress=lambda epochs, means: losses.append((epochs, means)),
    )
    [alone] = trained(
        network, Tuning(2, ((0.1, 0.0),)), epoch_batches=lambda epoch: batches(epoch, torch.float32)
    )
    assert not wild.weight.isfinite().all()
    assert same(bits(calm), bits(alone))
    assert [epochs for epochs, _ in losses] == [1, 2]
    assert not math.isfinite(losses[-1][1][0])
    assert 0 < losses[-1][1][1] < 4
    of_wild, of_calm = accuracies(network, [wild, calm], batches(9, torch.float32))
    assert all(math.isnan(value) for value in of_wild.values())
    assert all(math.isfinite(value) for value in of_calm.values())


@pytest.mark.parametrize("backbone_lr", [None, 1e30])
def test_where_all_diverge_it_ends_with_a_remedy(backbone_lr: float | None, tmp_path: Path) -> None:
    tuning = Tuning(9, ((1e300, 1.0),), backbone_lr=backbone_lr)
    with pytest.raises(
        FloatingPointError,
        match=r"in epoch \d, with a learning rate of 1e\+300.*: a lower one may help",
    ):
        trained(backbone(), tuning, checkpoint=tmp_path / "heads.pt")
    assert not any(tmp_path.iterdir()), "nothing that has diverged is kept"


def test_accuracies_are_those_of_scikit_learn() -> None:
    network = backbone()
    heads = trained(network, Tuning(2, ((0.01, 0.0), (0.1, 0.0))))
    views, labels = (
        torch.cat([v for (v,), _, _ in batches(8)]),
        torch.cat([x for _, x, _ in batches(8)]),
    )
    parts = [((views[a:b],), labels[a:b], labels[a:b]) for a, b in ((0, 10), (10, 20), (20, 24))]
    network.train()
    found = accuracies(network, heads, parts)
    assert not network.training
    names = np.arange(CLASSES)
    for head, ours in zip(heads, found, strict=True):
        scores = head(network(views)).softmax(1).detach().numpy()
        for k in (1, 5):
            assert ours[f"top{k}"] == pytest.approx(
                100 * top_k_accuracy_score(labels, scores, k=k, labels=names)
            )
        assert ours["loss"] == pytest.approx(log_loss(labels, scores, labels=names))
    assert 0 < found[0]["top1"] < found[0]["top5"] < 100


def test_with_fewer_than_five_classes_top5_is_all() -> None:
    network = backbone()
    [head] = train_heads(network, 3, Tuning(0, ((0.1, 0),)), batches, seed=0, settings={})
    few = [(views, labels % 3, samples) for views, labels, samples in batches(0)]
    assert accuracies(network, [head], few)[0]["top5"] == 100


def test_a_frozen_backbone_stays_as_it_was_and_that_is_checked() -> None:
    network = backbone()
    before = bits(network)
    trained(network, Tuning(2, ((0.3, 0.0),)))
    assert same(bits(network), before)

    def meddling(epoch: int) -> Batches:
        network.bn1.running_mean[0] += 1e-12
        return batches(epoch)

    with pytest.raises(AssertionError, match="frozen backbone has changed"):
        trained(network, Tuning(2, ((0.3, 0.0),)), epoch_batches=meddling)


def test_images_without_labels_never_teach_nor_count() -> None:
    network = backbone()
    unlabelled = [
        (views, torch.full_like(labels, -1), samples) for views, labels, samples in batches(0)
    ]
    with pytest.raises(IndexError):  # of the cross-entropy
        trained(network, Tuning(1, ((0.3, 0.0),)), epoch_batches=lambda epoch: unlabelled)
    with pytest.raises(IndexError):  # of the cross-entropy
        accuracies(network, trained(network, Tuning(0, ((0.3, 0.0),))), unlabelled)


def test_another_precision_is_that_of_the_features_alone() -> None:
    network = backbone(dtype=torch.float32)
    both = [
        trained(
            network,
            Tuning(1, ((0.1, 0.0),)),
            epoch_batches=lambda e: batches(e, torch.float32),
            amp_dtype=dtype,
        )[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert both[1].weight.dtype == torch.float32
    assert not torch.equal(both[0].weight, both[1].weight)
    torch.testing.assert_close(both[0].weight, both[1].weight, rtol=0.05, atol=0.01)


# ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────


FROZEN, TUNED = (
    Tuning(4, ((0.3, 1e-3), (0.1, 0.0))),
    Tuning(4, ((0.3, 0.0),), backbone_lr=0.01, milestones=(2,)),
)


def killed_in(epoch: int) -> Callable[[int], Batches]:
    def epoch_batches(now: int) -> Batches:
        yield from batches(now)[: None if now < epoch else 2]
        if now == epoch:
            raise KeyboardInterrupt

    return epoch_batches


@pytest.mark.parametrize("tuning", [FROZEN, TUNED], ids=["frozen", "tuned"])
def test_what_was_interrupted_goes_on_to_the_same_bits(tuning: Tuning, tmp_path: Path) -> None:
    path, whole = tmp_path / "heads.pt", backbone()
    expected = bits(*trained(whole, tuning), whole)
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            trained(
                backbone(),
                tuning,
                checkpoint=path,
                resume=epoch > 1,
                epoch_batches=killed_in(epoch),
            )
    network, seen = backbone(), []
    heads = trained(
        network,
        tuning,
        checkpoint=path,
        resume=True,
        progress=lambda epochs, _: seen.append(epochs),
    )
    assert same(bits(*heads, network), expected)
    assert seen == [4]
    network = backbone()
    again = trained(network, tuning, checkpoint=path, resume=True, epoch_batches=killed_in(0))
    assert same(bits(*again, network), expected), "a finished one has nothing left to do"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"tuning": replace(FROZEN, epochs=5)}, r"epochs: 4 saved, 5 now$"),
        (
            {"tuning": replace(FROZEN, momentum=0.5), "seed": 6},
            r"momentum: 0.9 saved, 0.5 now; seed: 5 saved, 6 now$",
        ),
        ({"tuning": TUNED}, r"backbone_lr: None saved, 0.01 now; heads: .*milestones: None saved"),
        ({"settings": {"data": "photos"}}, r"data: noise saved, photos now$"),
    ],
)
def test_other_settings_are_named_and_refused(
    named: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "heads.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(backbone(), FROZEN, checkpoint=path, epoch_batches=killed_in(1))
    with pytest.raises(
        ValueError, match=rf"heads\.pt cannot be resumed, it is of other settings: {said}"
    ):
        trained(backbone(), checkpoint=path, resume=True, **({"tuning": FROZEN} | named))


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"heads\.pt: No such file"):
        trained(backbone(), FROZEN, checkpoint=tmp_path / "heads.pt", resume=True)


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_twelve_heads_at_once_are_four_times_as_fast_as_one_after_the_other() -> None:
    """On the demo's images, decoded and distorted as in a real evaluation; the median of three turns."""
    train, _ = pipeline.find_splits(
        pipeline.demo_folder(pipeline.cache_folder(), lambda done, total: None)
    )
    store = pipeline.random_subset(1024, pipeline.open_store(train))
    loader = pipeline.open_loader(
        store, pipeline.center_view(48), pipeline.LoaderOptions(batch_size=256, shuffle=False)
    )
    network = build_backbone("resnet18", 16)
    grid = tuple((lr, decay) for lr in (0.03, 0.1, 0.3, 1.0) for decay in (0.0, 1e-6, 1e-4))

    def seconds(tunings: list[Tuning]) -> float:
        began = time.perf_counter()
        for tuning in tunings:
            train_heads(network, len(store.classes), tuning, loader.epoch, seed=0, settings={})
        return time.perf_counter() - began

    seconds([Tuning(1, grid)])
    turns = [
        seconds([Tuning(1, (one,)) for one in grid]) / seconds([Tuning(1, grid)]) for _ in range(3)
    ]
    assert statistics.median(turns) >= 4, turns
