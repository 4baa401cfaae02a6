"""Linear classifiers on a backbone: many at once on one that is frozen, or one that is fine-tuned together with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Batches, right
from .rooms import model


@dataclass(frozen=True)
class Tuning:
    """SGD with momentum on the cross-entropy. Rates are those that are used: nothing scales them by the batch size."""

    epochs: int
    heads: tuple[
        tuple[float, float], ...
    ]  # (learning rate, weight decay) of each: one, or the grid of a sweep
    momentum: float = 0.9
    backbone_lr: float | None = (
        None  # its learning rate, without weight decay; None: frozen, in evaluation mode
    )
    milestones: tuple[int, ...] | None = (
        None  # after so many epochs each rate falls; None: a cosine per epoch, to 0
    )
    gamma: float = 0.1  # what it is multiplied by there

    def factor(self, epoch: int) -> float:
        """The fraction of each rate that is used throughout `epoch` (from 0)."""
        if self.milestones is None:
            return model.learning_rate_factor(epoch, self.epochs, 0, end=0.0)
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


def train_heads(
    backbone: model.Backbone,
    classes: int,
    tuning: Tuning,
    epoch_batches: Callable[[int], Batches],
    *,
    seed: int,
    settings: dict[str, Any],
    checkpoint: Path | None = None,
    resume: bool = False,
    amp_dtype: torch.dtype = torch.float32,
    progress: Callable[[int, list[float]], None] = lambda epochs, losses: None,
) -> list[nn.Linear]:
    """A linear classifier for each of `tuning.heads`, all from the same start (`seed`), on the backbone's device.

    epoch_batches(epoch): its batches, all labelled (that is not looked at: a GPU would be waited for at each step), the
    first view of which is used. A frozen backbone looks at each once for all heads, in `amp_dtype`, and ends as it was,
    to the bit; heads that diverge (their loss is NaN) leave the others alone. A tuned one is changed; that is in
    float32. progress(epochs done, mean loss of each head).

    After each epoch everything is saved to `checkpoint`, from where `resume` goes on to the same bits; a finished one
    stays, and gives the same heads at once. `settings` (plain values) are what else has to be the same for that, the
    weights' origin and the data above all. ValueError where they differ; FloatingPointError where every head diverges.
    """
    tuned, weight = tuning.backbone_lr is not None, backbone.conv1.weight
    assert len(tuning.heads) == 1 if tuned else tuning.heads
    assert not tuned or amp_dtype == torch.float32
    frozen = {} if tuned else {name: value.clone() for name, value in backbone.state_dict().items()}
    heads = [_new_head(backbone.out_features, classes, seed).to(weight) for _ in tuning.heads]
    groups: list[dict[str, Any]] = [
        {"params": head.parameters(), "lr": lr, "weight_decay": decay}
        for head, (lr, decay) in zip(heads, tuning.heads, strict=True)
    ]
    if tuned:
        groups.append({"params": backbone.parameters(), "lr": tuning.backbone_lr})
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=tuning.momentum)

    learned: dict[str, Any] = {"heads": nn.ModuleList(heads), "optimizer": optimizer}
    if tuned:
        learned["backbone"] = backbone
    settings = (
        settings | asdict(tuning) | {"classes": classes, "seed": seed, "precision": str(amp_dtype)}
    )
    done = 0
    if resume:
        assert checkpoint is not None
        saved = model.load_checkpoint(checkpoint, weight.device)
        if changes := model.configuration_changes(saved.get("settings", {}), settings):
            raise ValueError(
                f"{checkpoint} cannot be resumed, it is of other settings: {'; '.join(changes)}"
            )
        done = model.load_states(learned, saved, checkpoint)["step"]

    for epoch in range(done, tuning.epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * tuning.factor(epoch)
        backbone.train(tuned)
        total, images = torch.zeros(len(heads), dtype=torch.float64, device=weight.device), 0
        for (view, *_), labels, _ in epoch_batches(epoch):
            with torch.set_grad_enabled(tuned):
                features = _features(backbone, view, amp_dtype)
            losses = torch.stack([F.cross_entropy(head(features), labels) for head in heads])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total += losses.detach() * len(labels)
            images += len(labels)
        means = (total / images).tolist()
        if not any(map(math.isfinite, means)):
            raise FloatingPointError(
                f"the loss is {means[0]} in epoch {epoch + 1}, with a learning rate of "
                f"{' and '.join(f'{rate:g}' for rate in rates)}: a lower one may help"
            )
        if checkpoint is not None:
            states = {name: part.state_dict() for name, part in learned.items()}
            model.save_checkpoint(checkpoint, {"step": epoch + 1, "settings": settings} | states)
        progress(epoch + 1, means)
    now = backbone.state_dict()
    assert all(torch.equal(now[name], value) for name, value in frozen.items()), (
        "the frozen backbone has changed"
    )
    return heads


@torch.no_grad()
def accuracies(
    backbone: model.Backbone,
    heads: Sequence[nn.Linear],
    batches: Batches,
    amp_dtype: torch.dtype = torch.float32,
) -> list[dict[str, float]]:
    """`top1` and `top5` in percent, and the mean cross-entropy `loss`, of each head: in one pass over labelled batches.

    Leaves the backbone in evaluation mode. All three are NaN for a head that has diverged.
    """
    backbone.eval()
    found = torch.zeros(len(heads), 3, dtype=torch.float64, device=backbone.conv1.weight.device)
    images = 0
    for (view, *_), labels, _ in batches:
        features = _features(backbone, view, amp_dtype)
        for head, sums in zip(heads, found, strict=True):
            scores = head(features)
            sums[:2] += right(scores, labels)
            sums[2] += F.cross_entropy(scores, labels, reduction="sum")
        images += len(labels)
    return [
        {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}
        if math.isfinite(loss)
        else dict.fromkeys(("top1", "top5", "loss"), math.nan)
        for top1, top5, loss in (found / images).tolist()
    ]


def _new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """As the authors start theirs: weights N(0, 0.01), bias 0."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


def _features(backbone: model.Backbone, view: Tensor, amp_dtype: torch.dtype) -> Tensor:
    """[B, F] in the precision of the backbone's weights, by arithmetic in `amp_dtype`."""
    with torch.autocast(view.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        return backbone(view).to(backbone.conv1.weight.dtype)
