"""The evaluations as typed configurations, with their published results. `evaluate.py NAME --help` shows all fields."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from .rooms import experiment

DEMO_RUN = Path(
    "runs/demo"
)  # what is evaluated where no --checkpoint is given: what `train.py` leaves by itself


class Published(NamedTuple):
    """A result that somebody has published, and the set-up that it belongs to, in the words of `results.py`."""

    source: str
    results: dict[str, float]  # percent
    setup: dict[str, Any]


_RESNET50 = {"backbone": "resnet50", "pretraining epochs": 1000, "view, px": 224}
_IMAGENET = _RESNET50 | {"training images": 1_281_167, "classes": 1000}
_PLACES = _RESNET50 | {"training images": 2_448_873, "classes": 205}
_INAT = _RESNET50 | {"training images": 437_513, "classes": 8142}
_PAPER = "the paper, 1000 epochs"

KNN_PUBLISHED = Published(
    "lightly, 100 epochs",
    {"knn_top1": 45.6},
    _IMAGENET | {"pretraining epochs": 100, "k": 200, "temperature": 0.1},
)
SVM_PUBLISHED = Published(
    _PAPER, {"map": 86.2}, _RESNET50 | {"training images": 5011, "test images": 4952, "classes": 20}
)
SEMISUP_PUBLISHED = {  # by the percentage of the training images that have labels
    1: Published(_PAPER, {"top1": 55.0, "top5": 79.2}, _IMAGENET | {"labelled images": 12_811}),
    10: Published(_PAPER, {"top1": 69.7, "top5": 89.3}, _IMAGENET | {"labelled images": 128_116}),
}


class LinearProtocol(NamedTuple):
    """How a linear classifier is trained on a frozen network: SGD with momentum 0.9 and cross-entropy."""

    epochs: int
    lr: float
    weight_decay: float
    published: Published
    milestones: tuple[
        int, ...
    ] = ()  # epochs after which the rate falls to a tenth; without any it falls as a cosine
    lr_scales: bool = False  # x batch / 256

    @property
    def setup(self) -> dict[str, Any]:
        """In the words of `results.py`."""
        schedule = (
            f"a tenth after {', '.join(map(str, self.milestones))}" if self.milestones else "cosine"
        )
        return {
            "epochs": self.epochs,
            "lr": self.lr,
            "weight decay": self.weight_decay,
            "schedule": schedule,
        }


_LINEAR = LinearProtocol(100, 0.3, 1e-6, Published(_PAPER, {"top1": 73.2, "top5": 91.0}, _IMAGENET))
_TRANSFER = LinearProtocol(
    14, 0.01, 5e-4, Published(_PAPER, {"top1": 54.1}, _PLACES), (5, 9), lr_scales=True
)

LINEAR = {
    "imagenet": _LINEAR,
    "mmpretrain": _LINEAR._replace(
        published=Published(
            "mmpretrain, 300 epochs", {"top1": 71.80}, _IMAGENET | {"pretraining epochs": 300}
        )
    ),
    "places205": _TRANSFER,
    "inat18": _TRANSFER._replace(
        epochs=84, milestones=(28, 56), published=Published(_PAPER, {"top1": 46.5}, _INAT)
    ),
    "demo": _LINEAR._replace(epochs=10),
}


class SemisupProtocol(NamedTuple):
    """How a network and its new classifier are tuned on a few labels: SGD with momentum 0.9, no weight decay."""

    backbone_lr: float
    milestones: tuple[
        int, ...
    ] = ()  # epochs after which both rates fall to a fifth; without any, as a cosine
    epochs: int = 20
    lr: float = 0.5  # of the classifier; neither is scaled by the batch
    batch_size: int = 256

    @property
    def setup(self) -> dict[str, Any]:
        """In the words of `results.py`."""
        schedule = (
            f"a fifth after {', '.join(map(str, self.milestones))}" if self.milestones else "cosine"
        )
        rates = {"lr": self.lr, "backbone lr": self.backbone_lr}
        return {"epochs": self.epochs, "batch": self.batch_size, **rates, "schedule": schedule}


SEMISUP = {
    "paper": SemisupProtocol(0.002, (12, 16)),
    "authors": SemisupProtocol(0.005),  # what their code does with the weights that they published
    "demo": SemisupProtocol(0.002, (12, 16), batch_size=32),
}


@dataclass(frozen=True)
class Network:
    """What is evaluated."""

    checkpoint: Path = DEMO_RUN
    """Folder of a run, or a file of weights: ours, the authors', mmpretrain's, solo-learn's, lightly's, VISSL's, timm's
    or torchvision's, told apart by what is in it; torch or safetensors. No code in it is run."""
    size: int | None = None
    """Side of a view, pixels [default: what the checkpoint says, else 224]."""
    output: Path | None = None
    """Folder for results [default: the run's own, or runs/NAME OF THE FILE]."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Images:
    """What it is evaluated on."""

    train: Path | None = None
    """Images with labels, in any form that train.py takes; with train and val (or test) in it, both. Without it, the
    embedded data set."""
    test: Path | None = None
    """Images to be asked about, whose classes are those of --train, by name."""
    decoder: experiment.DecoderName = "auto"
    """auto: DALI on a GPU, else cpu."""
    threads: int | None = None
    """Threads that decode [default: one a core]."""
    seed: int = 0
    """Of crops, order, and which images are drawn from many."""


@dataclass(frozen=True)
class Knn:
    """k nearest neighbours on frozen features, and what those are like: effective rank, alignment, uniformity."""

    network: Network
    images: Images
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Each votes with exp(cosine similarity / temperature)."""


@dataclass(frozen=True)
class Linear:
    """A linear classifier on frozen features. Published on ImageNet: 73.2 top-1, 91.0 top-5."""

    network: Network
    images: Images
    preset: Literal["imagenet", "mmpretrain", "places205", "inat18", "demo"] | None = None
    """The paper's on ImageNet, mmpretrain's, the paper's transfer to Places-205 and iNaturalist 2018, or `demo`: ten
    epochs [default: demo for the embedded data set, else imagenet]."""
    epochs: int | None = None
    """[default: 100; 14 for places205, 84 for inat18]"""
    batch_size: int = 256
    lr: tuple[float, ...] = ()
    """Learning rate, x batch / 256 for places205 and inat18; several train as many classifiers at once [default: 0.3;
    0.01 for those]."""
    weight_decay: tuple[float, ...] = ()
    """Likewise [default: 1e-6; 5e-4 for those]."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which the rate falls to a tenth. (VISSL's: 4 8 12 for places205, 24 48 72 for inat18.)"""
    sweep: bool = False
    """Twelve classifiers at once, one for each of four rates and three weight decays (where none are given)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen network; the classifier's is float32. float32 on a GPU multiplies in TF32."""
    resume: bool = False
    """Go on behind the last epoch of one that was ended."""

    def protocol(self) -> tuple[str, LinearProtocol]:
        """The name of the preset, and what the command line has made of it."""
        name = self.preset or ("imagenet" if self.images.train else "demo")
        given: dict[str, Any] = {"epochs": self.epochs, "milestones": self.milestones}
        protocol = LINEAR[name]._replace(
            **{field: value for field, value in given.items() if value is not None}
        )
        return name, protocol

    def heads(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each classifier, as they are applied."""
        protocol = self.protocol()[1]
        factors = (1 / 3, 1, 10 / 3, 10) if self.sweep else (1.0,)
        rates = self.lr or tuple(factor * protocol.lr for factor in factors)
        decays = self.weight_decay or (
            (0.0, 1e-6, 1e-4) if self.sweep else (protocol.weight_decay,)
        )
        scale = self.batch_size / 256 if protocol.lr_scales else 1.0
        return [(rate * scale, decay) for rate, decay in product(rates, decays)]

    def published(self) -> Published:
        """What is to be reached, and by what."""
        name = self.protocol()[0]
        protocol = LINEAR["imagenet" if name == "demo" else name]
        setup = {"batch": 256, "precision": "float32", "classifiers tried": 1} | protocol.setup
        return protocol.published._replace(setup=protocol.published.setup | setup)


@dataclass(frozen=True)
class Semisup:
    """Fine-tuning on a few labels. Published on ImageNet, top-1 / top-5: 1% 55.0 / 79.2, 10% 69.7 / 89.3."""

    network: Network
    images: Images
    labels: str = "0.1"
    """Fraction of each class of --train, drawn by --seed; or a file of SimCLR's: the name of an image on each line."""
    preset: Literal["paper", "authors", "demo"] | None = None
    """The paper's rates, falling to a fifth after epochs 12 and 16; those of the authors' code, falling as a cosine; or
    `demo`: the paper's in batches of 32 [default: demo for the embedded data set, else paper]."""
    epochs: int | None = None
    """[default: 20]"""
    batch_size: int | None = None
    """[default: 256]"""
    lr: float | None = None
    """Of the classifier [default: 0.5]."""
    backbone_lr: float | None = None
    """[default: 0.002; 0.005 for authors]"""
    resume: bool = False
    """Go on behind the last epoch of one that was ended."""

    def protocol(self) -> tuple[str, SemisupProtocol]:
        """The name of the preset, and what the command line has made of it."""
        name = self.preset or ("paper" if self.images.train else "demo")
        fields = ("epochs", "batch_size", "lr", "backbone_lr")
        given = {
            field: getattr(self, field) for field in fields if getattr(self, field) is not None
        }
        return name, SEMISUP[name]._replace(**given)

    def published(self, share: float) -> Published | None:
        """What is to be reached with labels for this share of the images, and by what."""
        found = SEMISUP_PUBLISHED.get(round(100 * share))
        return found and found._replace(setup=found.setup | SEMISUP["paper"].setup)


@dataclass(frozen=True)
class Svm:
    """Linear support vector machines on frozen features, one a class of VOC2007. Published: 86.2 mAP."""

    network: Network
    voc07: Path | None = None
    """The development kit: the folder with VOCdevkit in it. Without it, one that is made of the embedded data set."""
    decoder: experiment.DecoderName = "auto"
    threads: int | None = None
    """Threads that decode [default: one a core]."""


@dataclass(frozen=True)
class Predict:
    """The class of each image: by the checkpoint's classifier, or by a vote among the training images most like it."""

    pictures: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")] = ()
    """Without any: some test images of the embedded data set."""
    network: Network = Network()
    train: Path | None = None
    """Images with labels that vote where the checkpoint has no classifier, and among which neighbours are looked for:
    50,000 of them at most. Without it, the embedded data set, for a run on that."""
    neighbours: bool = False
    """Show the five training images that are most like each."""
    json: bool = False
    """Print JSON, and nothing else."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Each votes with exp(cosine similarity / temperature)."""


@dataclass(frozen=True)
class Export:
    """Write the weights as another program reads them."""

    network: Network
    to: Literal[
        "torchvision", "timm", "mmpretrain", "solo-learn", "lightly", "detectron2", "safetensors"
    ] = "torchvision"


@dataclass(frozen=True)
class Compare:
    """One table of what was measured on several networks, beside the published results."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")] = (DEMO_RUN,)
    """Folders with results."""


Job = Knn | Linear | Semisup | Svm | Predict | Export | Compare


def check(job: Job) -> None:
    """ValueError for what cannot be evaluated."""
    wrong: dict[str, tuple[Any, bool, str]] = {}
    if isinstance(job, Knn | Predict):
        wrong["--k"] = (job.k, job.k >= 1, "at least 1")
        wrong["--temperature"] = (job.temperature, job.temperature > 0, "above 0")
    if isinstance(job, Linear):
        lrs, decays = zip(*job.heads(), strict=True)
        wrong["--lr"] = (job.lr, all(0 < lr < float("inf") for lr in lrs), "finite and above 0")
        stones = job.protocol()[1].milestones
        wrong["--milestones"] = (
            stones,
            all(epoch >= 1 for epoch in stones),
            "epochs, counted from 1",
        )
        wrong["--weight-decay"] = (
            job.weight_decay,
            all(0 <= x < float("inf") for x in decays),
            "finite, at least 0",
        )
    if isinstance(job, Linear | Semisup):
        protocol = job.protocol()[1]
        wrong["--epochs"] = (protocol.epochs, protocol.epochs >= 1, "at least 1")
        batch = job.batch_size if isinstance(job, Linear) else job.protocol()[1].batch_size
        wrong["--batch-size"] = (batch, batch >= 1, "at least 1")
    if isinstance(job, Semisup):
        rates = {"--lr": job.protocol()[1].lr, "--backbone-lr": job.protocol()[1].backbone_lr}
        wrong |= {
            name: (rate, 0 < rate < float("inf"), "finite and above 0")
            for name, rate in rates.items()
        }
    if not isinstance(job, Compare):
        size, threads = job.network.size, getattr(getattr(job, "images", job), "threads", None)
        wrong["--size"] = (size, size is None or size >= 1, "at least 1 pixel")
        wrong["--threads"] = (threads, threads is None or threads >= 1, "at least 1")
    for option, (value, good, bound) in wrong.items():
        if not good:
            raise ValueError(f"{option} is {value}: it must be {bound}")


def parse(arguments: Sequence[str] | None = None) -> Job:
    """What the command line asks for."""
    kinds = (Knn, Linear, Semisup, Svm, Predict, Export, Compare)
    jobs: Any = Union[tuple(Annotated[kind, subcommand(kind.__name__.lower())] for kind in kinds)]  # noqa: UP007
    job: Job = tyro.cli(
        jobs,
        args=sys.argv[1:] if arguments is None else arguments,
        prog="evaluate.py",
        description="What pretrained weights are worth, and what they say about an image.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return job
