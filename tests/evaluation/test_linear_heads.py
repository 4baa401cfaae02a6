"""Training of linear heads, compared with a loop like the authors' evaluate.py; resuming; speed."""

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
from evaluation import Batches, RunOptions, SGDConfig, evaluate_heads, train_heads
from model import Backbone, build_backbone

CLASSES = 7


def random_backbone(width: int = 4, dtype: torch.dtype = torch.float64) -> Backbone:
    """With residual branches that are not zero, and running averages unlike the initial ones."""
    torch.manual_seed(3)
    network = build_backbone("resnet18", width)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("weight", "bias", "running_mean")):
                value.add_(0.1 * torch.randn(value.shape))
    return network.to(dtype)


def batches(
    epoch: int, dtype: torch.dtype = torch.float64
) -> list[tuple[tuple[Tensor], Tensor, Tensor]]:
    """Three batches of eight views of noise, whose brightness depends on the label."""
    generator = torch.Generator().manual_seed(epoch)
    result = []
    for _ in range(3):
        labels = torch.randint(CLASSES, (8,), generator=generator)
        noise = torch.randn(8, 3, 16, 16, generator=generator, dtype=dtype)
        views = noise + labels[:, None, None, None] / 5
        result.append(((views,), labels, torch.arange(8)))
    return result


def float32_batches(epoch: int) -> list[tuple[tuple[Tensor], Tensor, Tensor]]:
    return batches(epoch, torch.float32)


def train(
    network: Backbone,
    sgd: SGDConfig,
    epoch_batches: Callable[[int], Batches] = batches,
    **options: Any,
) -> list[nn.Linear]:
    run = RunOptions(**{"seed": 5, "settings": {"data": "noise"}, **options})
    return train_heads(network, CLASSES, sgd, epoch_batches, run)


def authors_loop(network: Backbone, sgd: SGDConfig, head: tuple[float, float]) -> nn.Module:
    """evaluate.py of facebookresearch/barlowtwins, with `--weights freeze` or `finetune`.

    The network is torchvision's; `head` is the classifier's learning rate and weight decay.
    """
    model = torchvision.models.resnet18(num_classes=CLASSES).double()
    [start] = train(copy.deepcopy(network), replace(sgd, epochs=0, heads=(head,)))
    model.load_state_dict(network.state_dict() | {"fc.weight": start.weight, "fc.bias": start.bias})
    finetune = sgd.backbone_lr is not None
    if not finetune:
        model.requires_grad_(False)
        model.fc.requires_grad_(True)

    groups = [{"params": model.fc.parameters(), "lr": head[0], "weight_decay": head[1]}]
    if finetune:
        names = {"fc.weight", "fc.bias"}
        rest = [value for name, value in model.named_parameters() if name not in names]
        groups.append({"params": rest, "lr": sgd.backbone_lr, "weight_decay": 0})
    optimizer = torch.optim.SGD(groups, 0, momentum=0.9)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if sgd.milestones:
        milestones = list(sgd.milestones)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, sgd.gamma)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sgd.epochs)

    criterion = nn.CrossEntropyLoss()
    for epoch in range(sgd.epochs):
        model.train(finetune)
        for (images,), target, _ in batches(epoch):
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def state_of(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def is_identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("milestones", [None, (1, 3)])
def test_each_head_on_a_frozen_backbone_is_that_of_the_authors(
    milestones: tuple[int, ...] | None,
) -> None:
    network = random_backbone(64)
    sgd = SGDConfig(4, ((0.3, 1e-6), (0.03, 0.05), (0.3, 0.05)), milestones=milestones, gamma=0.2)
    heads = train(copy.deepcopy(network), sgd)
    for settings, head in zip(sgd.heads, heads, strict=True):
        theirs = authors_loop(network, sgd, settings)
        assert_close(head.weight, theirs.fc.weight)
        assert_close(head.bias, theirs.fc.bias)
    assert not torch.allclose(heads[0].weight, heads[2].weight, rtol=1e-3), "weight decay counts"


@pytest.mark.parametrize("milestones", [None, (1, 2)])
def test_a_fine_tuned_network_is_that_of_the_authors(milestones: tuple[int, ...] | None) -> None:
    network = random_backbone(64)
    sgd = SGDConfig(3, ((0.05, 0.01),), backbone_lr=0.002, milestones=milestones, gamma=0.2)
    ours = copy.deepcopy(network)
    [head] = train(ours, sgd)
    theirs = authors_loop(network, sgd, sgd.heads[0]).state_dict()
    for name, value in ours.state_dict().items():
        assert_close(value, theirs[name])
    for name, value in head.state_dict().items():
        assert_close(value, theirs[f"fc.{name}"])
    assert int(ours.bn1.num_batches_tracked) == 9, "batch norm is in training mode"


def test_heads_trained_together_are_identical_to_heads_trained_alone() -> None:
    grid = ((0.3, 0.0), (3.0, 1e-3), (0.01, 0.1))
    together = train(random_backbone(), SGDConfig(3, grid))
    for settings, head in zip(grid, together, strict=True):
        [alone] = train(random_backbone(), SGDConfig(3, (settings,)))
        assert is_identical(state_of(head), state_of(alone))


def test_all_heads_start_from_the_same_small_weights() -> None:
    first, second = train(random_backbone(64), SGDConfig(0, ((0.1, 0), (0.2, 0))))
    [other_seed] = train(random_backbone(64), SGDConfig(0, ((0.1, 0),)), seed=6)
    assert is_identical(state_of(first), state_of(second))
    assert not is_identical(state_of(first), state_of(other_seed))
    weight = first.weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.05)  # of 3584 weights
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    assert not first.bias.any()


def test_a_head_that_diverges_does_not_affect_the_others() -> None:
    network = random_backbone(dtype=torch.float32)
    progress: list[tuple[int, list[float]]] = []

    def note_progress(epochs_done: int, losses: list[float]) -> None:
        progress.append((epochs_done, losses))

    diverging, stable = train(
        network,
        SGDConfig(2, ((1e38, 1.0), (0.1, 0.0))),
        float32_batches,
        progress=note_progress,
    )
    [alone] = train(network, SGDConfig(2, ((0.1, 0.0),)), float32_batches)
    assert not diverging.weight.isfinite().all()
    assert is_identical(state_of(stable), state_of(alone))

    assert [epochs_done for epochs_done, _ in progress] == [1, 2]
    _, (diverging_loss, stable_loss) = progress[-1]
    assert not math.isfinite(diverging_loss)
    assert 0 < stable_loss < 4
    scores = evaluate_heads(network, [diverging, stable], float32_batches(9))
    assert all(math.isnan(value) for value in scores[0].values())
    assert all(math.isfinite(value) for value in scores[1].values())


@pytest.mark.parametrize("backbone_lr", [None, 1e30])
def test_training_stops_with_a_remedy_if_all_heads_diverge(
    backbone_lr: float | None, tmp_path: Path
) -> None:
    sgd = SGDConfig(9, ((1e300, 1.0),), backbone_lr=backbone_lr)
    message = r"in epoch \d, with a learning rate of 1e\+300.*: try a lower --lr"
    with pytest.raises(FloatingPointError, match=message):
        train(random_backbone(), sgd, checkpoint=tmp_path / "heads.pt")
    assert not any(tmp_path.iterdir()), "weights that have diverged are not saved"


def test_a_frozen_backbone_is_identical_afterwards() -> None:
    network = random_backbone()
    before = state_of(network)
    train(network, SGDConfig(2, ((0.3, 0.0),)))
    assert is_identical(state_of(network), before)


def test_a_change_of_the_frozen_backbone_is_detected() -> None:
    network = random_backbone()

    def batches_that_change_the_backbone(epoch: int) -> Batches:
        network.bn1.running_mean[0] += 1e-12
        return batches(epoch)

    with pytest.raises(AssertionError, match="frozen backbone has changed"):
        train(network, SGDConfig(2, ((0.3, 0.0),)), batches_that_change_the_backbone)


def test_reduced_precision_affects_only_the_features() -> None:
    network = random_backbone(dtype=torch.float32)
    sgd = SGDConfig(1, ((0.1, 0.0),))
    [full] = train(network, sgd, float32_batches)
    [reduced] = train(network, sgd, float32_batches, amp_dtype=torch.bfloat16)
    assert reduced.weight.dtype == torch.float32
    assert not torch.equal(full.weight, reduced.weight)
    torch.testing.assert_close(full.weight, reduced.weight, rtol=0.05, atol=0.01)


# --- Evaluation -----------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn() -> None:
    network = random_backbone()
    heads = train(network, SGDConfig(2, ((0.01, 0.0), (0.1, 0.0))))
    views = torch.cat([view for (view,), _, _ in batches(8)])
    labels = torch.cat([part for _, part, _ in batches(8)])
    parts = [((views[a:b],), labels[a:b], labels[a:b]) for a, b in ((0, 10), (10, 20), (20, 24))]
    network.train()
    results = evaluate_heads(network, heads, parts)
    assert not network.training

    names = np.arange(CLASSES)
    for head, result in zip(heads, results, strict=True):
        scores = head(network(views)).softmax(1).detach().numpy()
        for k in (1, 5):
            accuracy = top_k_accuracy_score(labels, scores, k=k, labels=names)
            assert result[f"top{k}"] == pytest.approx(100 * accuracy)
        assert result["loss"] == pytest.approx(log_loss(labels, scores, labels=names))
    assert 0 < results[0]["top1"] < results[0]["top5"] < 100


def test_top5_is_100_if_there_are_fewer_than_five_classes() -> None:
    network = random_backbone()
    options = RunOptions(seed=0, settings={})
    [head] = train_heads(network, 3, SGDConfig(0, ((0.1, 0),)), batches, options)
    few = [(views, labels % 3, samples) for views, labels, samples in batches(0)]
    assert evaluate_heads(network, [head], few)[0]["top5"] == 100


def test_images_without_labels_are_an_error() -> None:
    network = random_backbone()
    unlabelled = [
        (views, torch.full_like(labels, -1), samples) for views, labels, samples in batches(0)
    ]
    heads = train(network, SGDConfig(0, ((0.3, 0.0),)))
    with pytest.raises(IndexError):  # of the cross-entropy
        train(network, SGDConfig(1, ((0.3, 0.0),)), lambda epoch: unlabelled)
    with pytest.raises(IndexError):  # of the cross-entropy
        evaluate_heads(network, heads, unlabelled)


# --- Resuming -------------------------------------------------------------------------------------

FROZEN = SGDConfig(4, ((0.3, 1e-3), (0.1, 0.0)))
FINE_TUNED = SGDConfig(4, ((0.3, 0.0),), backbone_lr=0.01, milestones=(2,))


def interrupted_in(interrupted_epoch: int) -> Callable[[int], Batches]:
    """The batches of each epoch; KeyboardInterrupt after two batches of one epoch."""

    def epoch_batches(epoch: int) -> Batches:
        if epoch < interrupted_epoch:
            yield from batches(epoch)
            return
        yield from batches(epoch)[:2]
        raise KeyboardInterrupt

    return epoch_batches


@pytest.mark.parametrize("sgd", [FROZEN, FINE_TUNED], ids=["frozen", "fine-tuned"])
def test_resume_is_bit_exact(sgd: SGDConfig, tmp_path: Path) -> None:
    checkpoint = tmp_path / "heads.pt"
    uninterrupted = random_backbone()
    expected = state_of(*train(uninterrupted, sgd), uninterrupted)
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(
                random_backbone(),
                sgd,
                interrupted_in(epoch),
                checkpoint=checkpoint,
                resume=epoch > 1,
            )

    network = random_backbone()
    epochs: list[int] = []
    heads = train(
        network,
        sgd,
        checkpoint=checkpoint,
        resume=True,
        progress=lambda epochs_done, losses: epochs.append(epochs_done),
    )
    assert is_identical(state_of(*heads, network), expected)
    assert epochs == [4]


@pytest.mark.parametrize("sgd", [FROZEN, FINE_TUNED], ids=["frozen", "fine-tuned"])
def test_resuming_a_finished_training_returns_its_heads(sgd: SGDConfig, tmp_path: Path) -> None:
    checkpoint = tmp_path / "heads.pt"
    trained = random_backbone()
    expected = state_of(*train(trained, sgd, checkpoint=checkpoint), trained)
    network = random_backbone()
    # No batch is read, or it would be interrupted.
    heads = train(network, sgd, interrupted_in(0), checkpoint=checkpoint, resume=True)
    assert is_identical(state_of(*heads, network), expected)


@pytest.mark.parametrize(
    ("sgd", "options", "message"),
    [
        (replace(FROZEN, epochs=5), {}, r"epochs: 4 saved, 5 now\."),
        (
            replace(FROZEN, momentum=0.5),
            {"seed": 6},
            r"momentum: 0.9 saved, 0.5 now; seed: 5 saved, 6 now\.",
        ),
        (
            FINE_TUNED,
            {},
            r"backbone_lr: None saved, 0.01 now; heads: .*milestones: None saved",
        ),
        (FROZEN, {"settings": {"data": "photos"}}, r"data: noise saved, photos now\."),
    ],
)
def test_resuming_with_other_settings_is_refused(
    sgd: SGDConfig, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "heads.pt"
    with pytest.raises(KeyboardInterrupt):
        train(random_backbone(), FROZEN, interrupted_in(1), checkpoint=checkpoint)
    start = r"heads\.pt cannot be resumed with other settings than it was saved with: "
    with pytest.raises(ValueError, match=start + message):
        train(random_backbone(), sgd, checkpoint=checkpoint, resume=True, **options)


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"heads\.pt: No such file"):
        train(random_backbone(), FROZEN, checkpoint=tmp_path / "heads.pt", resume=True)


# --- Speed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twelve_heads_together_are_four_times_as_fast_as_one_by_one() -> None:
    """On demo images, decoded and distorted as in a real evaluation; the median of three runs."""
    folder, _ = pipeline.find_splits(pipeline.demo_folder(pipeline.cache_folder()))
    store = pipeline.random_subset(1024, pipeline.open_store(folder))
    loader = pipeline.open_loader(
        store, pipeline.center_view(48), pipeline.LoaderOptions(batch_size=256, shuffle=False)
    )
    network = build_backbone("resnet18", 16)
    grid = tuple((lr, decay) for lr in (0.03, 0.1, 0.3, 1.0) for decay in (0.0, 1e-6, 1e-4))
    options = RunOptions(seed=0, settings={})

    def seconds(configs: list[SGDConfig]) -> float:
        start = time.perf_counter()
        for sgd in configs:
            train_heads(network, len(store.classes), sgd, loader.epoch, options)
        return time.perf_counter() - start

    together = [SGDConfig(1, grid)]
    one_by_one = [SGDConfig(1, (head,)) for head in grid]
    seconds(together)
    ratios = [seconds(one_by_one) / seconds(together) for _ in range(3)]
    assert statistics.median(ratios) >= 4, ratios
