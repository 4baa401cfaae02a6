"""Training of linear classifiers on the images of a command, and the files that it writes.

`linear_heads.py` has the training loop. An interrupted training leaves `NAME.unfinished.pt` in the
folder for results, which `--resume` continues from; a finished one leaves `NAME.safetensors`, the
network with its classifier, which `predict` and `load_classifier` read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .evaluated_network import EvaluatedNetwork
from .linear_heads import RunOptions, SGDConfig, train_heads
from .sibling_packages import experiment, model, pipeline


@dataclass(frozen=True)
class ClassifierTraining:
    """A training of linear classifiers, apart from its network and images."""

    name: str
    """Name of the evaluation and of its files."""
    sgd: SGDConfig
    batch_size: int
    seed: int
    """Decides the initial weights, the order of the images and the crops."""
    resume: bool = False
    precision: str = "float32"
    """Data type that a frozen network computes in: float32, bfloat16 or float16."""

    @property
    def amp_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype


def train_classifiers(
    network: EvaluatedNetwork, train: pipeline.Store, training: ClassifierTraining
) -> list[nn.Linear]:
    """Train linear classifiers on random crops of `train`, with a progress bar.

    Raises:
        ValueError: `training.resume` is set, and there is nothing to resume from, or it was saved
            with other settings.
        FloatingPointError: The loss of every classifier is not finite.
    """
    checkpoint = _unfinished_path(network, training.name)
    if training.resume and not checkpoint.exists():
        raise ValueError(f"{checkpoint} does not exist: --resume has nothing to resume from")
    loader = network.open_loader(
        train,
        pipeline.crop_view(network.size),
        training.batch_size,
        shuffle=True,
        seed=training.seed,
    )
    network.folder.mkdir(parents=True, exist_ok=True)

    with network.console.progress_bar(training.name) as bar:
        progress = _TrainingProgress(bar, loader, training.sgd.epochs)
        options = RunOptions(
            seed=training.seed,
            settings={
                "images": pipeline.fingerprint(train),
                "weights": network.weights_digest(),
                "view": network.size,
                "batch": training.batch_size,
            },
            checkpoint=checkpoint,
            resume=training.resume,
            amp_dtype=training.amp_dtype,
            progress=progress.note_losses,
        )
        heads = train_heads(
            network.backbone, len(train.classes), training.sgd, progress.batches, options
        )
    network.print_bad_images(loader, "replaced")
    return heads


def export_classifier(
    network: EvaluatedNetwork,
    head: nn.Linear,
    score: dict[str, float],
    classes: list[str],
    name: str,
) -> Path:
    """Write the network with a trained classifier; returns the path of the file.

    FloatingPointError if the classifier has diverged, by its `score`.
    """
    if not math.isfinite(score["loss"]):
        raise FloatingPointError(
            "the trained classifier's outputs are not finite: lower learning rates may help"
        )
    # The layout stays, since it identifies solo-learn's small stem, and so do the other fields.
    weights = replace(
        network.weights,
        backbone=network.backbone.state_dict(),
        head={key: value.detach().cpu() for key, value in head.state_dict().items()},
        classes=classes,
        size=network.size,
    )
    path = network.folder / f"{name}.safetensors"
    model.export(weights, "safetensors", path)
    return path


def remove_unfinished(network: EvaluatedNetwork, name: str) -> None:
    """Remove the checkpoint of a training whose results are written."""
    _unfinished_path(network, name).unlink(missing_ok=True)


class _TrainingProgress:
    """The batches of each epoch, counted on a progress bar that shows the last epoch's loss."""

    def __init__(self, bar: experiment.ProgressBar, loader: pipeline.Loader, epochs: int) -> None:
        self._bar = bar
        self._loader = loader
        self._epochs = epochs
        self._losses: list[float] = []

    def batches(self, epoch: int) -> Iterator[pipeline.Batch]:
        status = f"epoch {epoch + 1} of {self._epochs}"
        if self._losses:
            status += f", loss {min(self._losses):.4g} in the last epoch"
        steps = len(self._loader)
        for step, batch in enumerate(self._loader.epoch(epoch), epoch * steps + 1):
            yield batch
            self._bar(step, self._epochs * steps, status)

    def note_losses(self, epochs_done: int, losses: list[float]) -> None:
        """Remember the mean loss of each classifier in the last epoch."""
        self._losses = losses


def _unfinished_path(network: EvaluatedNetwork, name: str) -> Path:
    return network.folder / f"{name}.unfinished.pt"
