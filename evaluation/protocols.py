"""The published evaluation protocols: their hyper-parameters, and the results to compare with.

The sources are the paper (Zbontar et al. 2021), lightly's and mmpretrain's benchmarks, and the
authors' code. `command_options.py` turns a protocol and the command line into a configuration;
`results.py` prints a measured result beside the published one.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A published result and the set-up in which it was measured.

    `setup` has the same keys as the set-ups that evaluate.py records, so that `results.differences`
    can compare the two.
    """

    source: str
    results: dict[str, float]  # percent
    setup: dict[str, Any]


_RESNET50 = {"backbone": "resnet50", "pretraining epochs": 1000, "view, px": 224}
_IMAGENET = _RESNET50 | {"training images": 1_281_167, "classes": 1000}
_PLACES = _RESNET50 | {"training images": 2_448_873, "classes": 205}
_INAT = _RESNET50 | {"training images": 437_513, "classes": 8142}
_VOC07 = _RESNET50 | {"training images": 5011, "test images": 4952, "classes": 20}
_PAPER = "the paper, 1000 epochs"

KNN_PUBLISHED = Published(
    "lightly, 100 epochs",
    {"knn_top1": 45.6},
    _IMAGENET | {"pretraining epochs": 100, "k": 200, "temperature": 0.1},
)

SVM_PUBLISHED = Published(_PAPER, {"map": 86.2}, _VOC07)

# Keys: percentage of the training images whose labels are used.
SEMISUP_PUBLISHED = {
    1: Published(_PAPER, {"top1": 55.0, "top5": 79.2}, _IMAGENET | {"labelled images": 12_811}),
    10: Published(_PAPER, {"top1": 69.7, "top5": 89.3}, _IMAGENET | {"labelled images": 128_116}),
}


class LinearProtocol(NamedTuple):
    """Training of a linear classifier on a frozen network: SGD, momentum 0.9, cross-entropy."""

    epochs: int
    lr: float
    weight_decay: float
    published: Published
    milestones: tuple[int, ...] = ()
    """Epochs after which the learning rate falls to a tenth; without any, it follows a cosine."""
    lr_scales: bool = False
    """Whether the learning rate is multiplied by batch size / 256."""

    @property
    def setup(self) -> dict[str, Any]:
        """The protocol as part of a recorded set-up."""
        return {
            "epochs": self.epochs,
            "lr": self.lr,
            "weight decay": self.weight_decay,
            "schedule": _describe_schedule("a tenth", self.milestones),
        }


_LINEAR = LinearProtocol(
    epochs=100,
    lr=0.3,
    weight_decay=1e-6,
    published=Published(_PAPER, {"top1": 73.2, "top5": 91.0}, _IMAGENET),
)
_TRANSFER = LinearProtocol(
    epochs=14,
    lr=0.01,
    weight_decay=5e-4,
    published=Published(_PAPER, {"top1": 54.1}, _PLACES),
    milestones=(5, 9),
    lr_scales=True,
)
_MMPRETRAIN_PUBLISHED = Published(
    "mmpretrain, 300 epochs", {"top1": 71.80}, _IMAGENET | {"pretraining epochs": 300}
)

LINEAR = {
    "imagenet": _LINEAR,
    "mmpretrain": _LINEAR._replace(published=_MMPRETRAIN_PUBLISHED),
    "places205": _TRANSFER,
    "inat18": _TRANSFER._replace(
        epochs=84, milestones=(28, 56), published=Published(_PAPER, {"top1": 46.5}, _INAT)
    ),
    "demo": _LINEAR._replace(epochs=10),
}


class SemisupProtocol(NamedTuple):
    """Fine-tuning of the network and a new linear classifier on few labels.

    SGD with momentum 0.9 and no weight decay. Neither learning rate is scaled by the batch size.
    """

    backbone_lr: float
    milestones: tuple[int, ...] = ()
    """Epochs after which both learning rates fall to a fifth; without any, they follow a cosine."""
    epochs: int = 20
    lr: float = 0.5
    """Learning rate of the classifier."""
    batch_size: int = 256

    @property
    def setup(self) -> dict[str, Any]:
        """The protocol as part of a recorded set-up."""
        return {
            "epochs": self.epochs,
            "batch": self.batch_size,
            "lr": self.lr,
            "backbone lr": self.backbone_lr,
            "schedule": _describe_schedule("a fifth", self.milestones),
        }


SEMISUP = {
    "paper": SemisupProtocol(backbone_lr=0.002, milestones=(12, 16)),
    # The authors' code for their released weights.
    "authors": SemisupProtocol(backbone_lr=0.005),
    "demo": SemisupProtocol(backbone_lr=0.002, milestones=(12, 16), batch_size=32),
}


def _describe_schedule(fraction: str, milestones: tuple[int, ...]) -> str:
    if not milestones:
        return "cosine"
    return f"{fraction} after {', '.join(map(str, milestones))}"
