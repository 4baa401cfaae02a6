"""Training of linear classifiers ("heads") on a backbone by SGD, as the published protocols do.

Several heads are trained at once on a frozen backbone, or one head is fine-tuned together with the
backbone. `classifier_training.py` does this for the images and the checkpoint of a command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Batches, count_correct
from .sibling_packages import model


@dataclass(frozen=True)
class SGDConfig:
    """SGD with momentum on the cross-entropy. No learning rate is scaled by the batch size."""

    epochs: int
    heads: tuple[tuple[float, float], ...]
    """Learning rate and weight decay of each head."""
    momentum: float = 0.9
    backbone_lr: float | None = None
    """Learning rate of the backbone, without weight decay; None: the backbone is frozen."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which all learning rates fall; None: a cosine to 0, constant in an epoch."""
    gamma: float = 0.1
    """Factor on the learning rates at each milestone."""

    @property
    def fine_tunes(self) -> bool:
        """Whether the backbone is trained too."""
        return self.backbone_lr is not None

    def learning_rate_factor(self, epoch: int) -> float:
        """The fraction of the initial learning rates that is used during `epoch`, from 0."""
        if self.milestones is None:
            return model.learning_rate_factor(epoch, self.epochs, 0, end=0.0)
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


def _ignore_progress(epochs_done: int, mean_losses: list[float]) -> None:
    pass


@dataclass(frozen=True)
class RunOptions:
    """How a training of heads is started, saved and resumed."""

    seed: int
    """Decides the initial weights, which are the same for all heads."""
    settings: dict[str, Any]
    """Plain values that must be equal to resume, besides the hyper-parameters: the origin of the
    backbone's weights and of the images above all."""
    checkpoint: Path | None = None
    """File that is saved after each epoch."""
    resume: bool = False
    """Resume from `checkpoint`."""
    amp_dtype: torch.dtype = torch.float32
    """Precision of a frozen backbone; the heads are trained in the precision of its weights."""
    progress: Callable[[int, list[float]], None] = _ignore_progress
    """Called after each epoch with the number of epochs done and the mean loss of each head."""


def train_heads(
    backbone: model.Backbone,
    classes: int,
    sgd: SGDConfig,
    epoch_batches: Callable[[int], Batches],
    options: RunOptions,
) -> list[nn.Linear]:
    """Train a linear classifier for each of `sgd.heads`, on the backbone's device.

    A frozen backbone computes the features of a batch once for all heads, and is bit-identical
    afterwards. A head whose loss becomes NaN does not affect the others. A fine-tuned backbone is
    changed in place, and is trained in float32.

    Training that is resumed from the checkpoint gives the same bits as without interruption. The
    checkpoint of a finished training stays, and resuming it returns the same heads at once.

    Args:
        backbone: The network [B, 3, S, S] -> [B, F].
        classes: The number of classes.
        sgd: The hyper-parameters.
        epoch_batches: Returns the batches of an epoch. The first view of each is used. All images
            must have labels; that is not checked, since a GPU would have to be waited for.
        options: Seed, checkpoint, precision and progress.

    Raises:
        ValueError: The checkpoint cannot be read, or was saved with other settings.
        FloatingPointError: The loss of every head is not finite.
    """
    if sgd.fine_tunes:
        assert len(sgd.heads) == 1
        assert options.amp_dtype == torch.float32
    else:
        assert sgd.heads
    weight = backbone.conv1.weight
    heads = [_new_head(backbone.out_features, classes, options.seed).to(weight) for _ in sgd.heads]
    trainer = _HeadTrainer(backbone, heads, sgd, options.amp_dtype)
    settings = {
        **options.settings,
        **asdict(sgd),
        "classes": classes,
        "seed": options.seed,
        "precision": str(options.amp_dtype),
    }
    frozen_state = None if sgd.fine_tunes else _copy_of_state(backbone)

    epochs_done = 0
    if options.resume:
        assert options.checkpoint is not None
        epochs_done = _resume(trainer.states, settings, options.checkpoint, weight.device)
    for epoch in range(epochs_done, sgd.epochs):
        mean_losses = trainer.train_epoch(epoch, epoch_batches(epoch))
        if options.checkpoint is not None:
            states = {name: part.state_dict() for name, part in trainer.states.items()}
            state = {"step": epoch + 1, "settings": settings, **states}
            model.save_checkpoint(options.checkpoint, state)
        options.progress(epoch + 1, mean_losses)

    if frozen_state is not None:
        _assert_unchanged(backbone, frozen_state)
    return heads


class _HeadTrainer:
    """The heads, their optimizer and the training of one epoch."""

    def __init__(
        self,
        backbone: model.Backbone,
        heads: list[nn.Linear],
        sgd: SGDConfig,
        amp_dtype: torch.dtype,
    ) -> None:
        self._backbone = backbone
        self._heads = heads
        self._sgd = sgd
        self._amp_dtype = amp_dtype
        groups: list[dict[str, Any]] = [
            {"params": head.parameters(), "lr": lr, "weight_decay": decay}
            for head, (lr, decay) in zip(heads, sgd.heads, strict=True)
        ]
        if sgd.fine_tunes:
            groups.append({"params": backbone.parameters(), "lr": sgd.backbone_lr})
        self._initial_rates: list[float] = [group["lr"] for group in groups]
        self._optimizer = torch.optim.SGD(groups, momentum=sgd.momentum)
        self.states: dict[str, Any] = {
            "heads": nn.ModuleList(heads),
            "optimizer": self._optimizer,
        }
        """What a checkpoint saves."""
        if sgd.fine_tunes:
            self.states["backbone"] = backbone

    def train_epoch(self, epoch: int, batches: Batches) -> list[float]:
        """Train on the batches of an epoch; returns the mean loss of each head.

        FloatingPointError if none of them is finite.
        """
        factor = self._sgd.learning_rate_factor(epoch)
        for group, rate in zip(self._optimizer.param_groups, self._initial_rates, strict=True):
            group["lr"] = rate * factor
        fine_tunes = self._sgd.fine_tunes
        self._backbone.train(fine_tunes)
        device = self._backbone.conv1.weight.device
        total = torch.zeros(len(self._heads), dtype=torch.float64, device=device)
        images = 0
        for (view, *_), labels, _ in batches:
            with torch.set_grad_enabled(fine_tunes):
                features = _features(self._backbone, view, self._amp_dtype)
            losses = torch.stack([F.cross_entropy(head(features), labels) for head in self._heads])
            self._optimizer.zero_grad()
            losses.sum().backward()
            self._optimizer.step()
            total += losses.detach() * len(labels)
            images += len(labels)

        mean_losses: list[float] = (total / images).tolist()
        if not any(map(math.isfinite, mean_losses)):
            rates = " and ".join(f"{rate:g}" for rate in self._initial_rates)
            raise FloatingPointError(
                f"the loss is {mean_losses[0]} in epoch {epoch + 1}, with a learning rate of "
                f"{rates}: try a lower --lr"
            )
        return mean_losses


@torch.no_grad()
def evaluate_heads(
    backbone: model.Backbone,
    heads: Sequence[nn.Linear],
    batches: Batches,
    amp_dtype: torch.dtype = torch.float32,
) -> list[dict[str, float]]:
    """Measure each head in one pass over labelled batches.

    Leaves the backbone in evaluation mode.

    Returns:
        `top1` and `top5` accuracy in percent, and the mean cross-entropy `loss`, for each head. All
        three are NaN for a head that has diverged.
    """
    backbone.eval()
    device = backbone.conv1.weight.device
    correct = torch.zeros(len(heads), 2, dtype=torch.float64, device=device)  # top-1, top-5
    losses = torch.zeros(len(heads), dtype=torch.float64, device=device)
    images = 0
    for (view, *_), labels, _ in batches:
        features = _features(backbone, view, amp_dtype)
        for i, head in enumerate(heads):
            scores = head(features)
            correct[i] += count_correct(scores, labels)
            losses[i] += F.cross_entropy(scores, labels, reduction="sum")
        images += len(labels)

    results = []
    for (top1, top5), loss in zip(
        (correct / images).tolist(), (losses / images).tolist(), strict=True
    ):
        if math.isfinite(loss):
            results.append({"top1": 100 * top1, "top5": 100 * top5, "loss": loss})
        else:
            results.append({"top1": math.nan, "top5": math.nan, "loss": math.nan})
    return results


def _new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A head with the authors' initial weights: N(0, 0.01), and bias 0."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


def _features(backbone: model.Backbone, view: Tensor, amp_dtype: torch.dtype) -> Tensor:
    """Features [B, F], computed in `amp_dtype` and returned in the precision of the weights."""
    with torch.autocast(view.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        return backbone(view).to(backbone.conv1.weight.dtype)


def _resume(
    states: dict[str, Any], settings: dict[str, Any], checkpoint: Path, device: torch.device
) -> int:
    """Load the states from the checkpoint; returns the number of epochs that are done."""
    saved = model.load_checkpoint(checkpoint, device)
    changes = model.configuration_changes(saved.get("settings", {}), settings)
    if changes:
        raise ValueError(
            f"{checkpoint} cannot be resumed with other settings than it was saved with: "
            f"{'; '.join(changes)}. Use the saved ones, or train anew without --resume"
        )
    epochs_done: int = model.load_states(states, saved, checkpoint)["step"]
    return epochs_done


def _copy_of_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), f"the frozen backbone has changed: {name}"
