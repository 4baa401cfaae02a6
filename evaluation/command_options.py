"""The commands of evaluate.py as typed configurations.

The fields are options, and the text below each is its help. tyro keeps the line breaks of those
texts, so each line is a sentence. `evaluate.py COMMAND --help` shows them. `protocols.py` has the
published settings that the presets name.

Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from .protocols import (
    LINEAR,
    SEMISUP,
    SEMISUP_PUBLISHED,
    LinearProtocol,
    Published,
    SemisupProtocol,
)
from .sibling_packages import experiment

DEMO_RUN = Path("runs/demo")
"""The run that `train.py` writes if it is started without arguments: the default checkpoint."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network to evaluate."""

    checkpoint: Path = DEMO_RUN
    """Folder of a run, or a file of weights, as a torch or safetensors file.
    It may be twinfeed's, the Barlow Twins authors', mmpretrain's, solo-learn's, lightly's, VISSL's,
    timm's or torchvision's.
    The layout is detected. Code in the file is not run."""
    size: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Height and width of a view, in pixels [default: as in the checkpoint, else 224]."""
    output: Annotated[Path | None, experiment.DEFAULT_IN_HELP] = None
    """Folder for the files that the command writes.
    [default: the run's own folder, or runs/CHECKPOINT_STEM]"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @property
    def is_demo_run(self) -> bool:
        """Whether the checkpoint is the default run, which was trained on the demo data set."""
        return self.checkpoint == DEMO_RUN

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        size_is_valid = self.size is None or self.size >= 1
        experiment.check_option("--size", self.size, size_is_valid, "at least 1 pixel")


@dataclass(frozen=True)
class ImagesConfig:
    """The labelled images to evaluate on."""

    train: Annotated[Path | None, experiment.DEFAULT_IN_HELP] = None
    """Training set, in any format that train.py reads.
    If it contains train and val (or test), both are used.
    [default: the demo data set]"""
    test: Annotated[Path | None, experiment.DEFAULT_IN_HELP] = None
    """Test set. Its class names must all occur in --train.
    [default: the val or test folder beside the training images]"""
    decoder: experiment.DecoderName = "auto"
    """auto: DALI on a GPU, else cpu."""
    threads: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Number of decoding threads [default: one per core]."""
    seed: int = 0
    """Seed of crops, order and random subsets."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        _check_threads(self.threads)


@dataclass(frozen=True)
class KnnCommand:
    """Measure kNN accuracy, effective rank, alignment and uniformity of frozen features."""

    network: NetworkConfig
    images: ImagesConfig
    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """Each neighbour votes with weight exp(cosine similarity / temperature)."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()
        self.images.check()
        _check_vote(self.k, self.temperature)


@dataclass(frozen=True)
class LinearCommand:
    """Train a linear classifier on frozen features.

    Published on ImageNet: top-1 73.2, top-5 91.0.
    """

    network: NetworkConfig
    images: ImagesConfig
    preset: Annotated[
        Literal["imagenet", "mmpretrain", "places205", "inat18", "demo"] | None,
        experiment.DEFAULT_IN_HELP,
    ] = None
    """imagenet: the paper's protocol on ImageNet.
    mmpretrain: the same settings; the result is shown beside mmpretrain's.
    places205, inat18: the paper's transfer to Places-205 and iNaturalist 2018.
    demo: as imagenet, for ten epochs.
    [default: demo for the demo data set, else imagenet]"""
    epochs: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Number of passes over the training set
    [default: 100; 10 for demo, 14 for places205, 84 for inat18]."""
    batch_size: int = 256
    """Images per step."""
    lr: Annotated[tuple[float, ...], experiment.DEFAULT_IN_HELP] = ()
    """Learning rate; multiplied by batch size / 256 for places205 and inat18.
    Several values train several classifiers at once.
    [default: 0.3; 0.01 for places205 and inat18]"""
    weight_decay: Annotated[tuple[float, ...], experiment.DEFAULT_IN_HELP] = ()
    """Weight decay; several values train several classifiers at once.
    [default: 1e-6; 5e-4 for places205 and inat18]"""
    milestones: Annotated[tuple[int, ...] | None, experiment.DEFAULT_IN_HELP] = None
    """Epochs after which the learning rate falls to a tenth.
    VISSL uses 4 8 12 for places205 and 24 48 72 for inat18.
    [default: 5 9 for places205, 28 56 for inat18, else none: a cosine schedule]"""
    sweep: bool = False
    """Train twelve classifiers at once: four learning rates with three weight decays each.
    Values given with --lr or --weight-decay are used instead."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen network; the classifier is float32.
    On a GPU, float32 matrix products use TF32."""
    resume: bool = False
    """Resume an interrupted training after its last finished epoch."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()
        self.images.check()
        learning_rates, weight_decays = zip(*self.heads(), strict=True)
        experiment.check_option(
            "--lr", self.lr, all(map(_is_valid_rate, learning_rates)), "finite and above 0"
        )
        experiment.check_option(
            "--weight-decay",
            self.weight_decay,
            all(0 <= decay < math.inf for decay in weight_decays),
            "finite, at least 0",
        )
        milestones = self.protocol.milestones
        experiment.check_option(
            "--milestones",
            milestones,
            all(epoch >= 1 for epoch in milestones),
            "epoch numbers, 1 or more",
        )
        _check_at_least_one("--epochs", self.protocol.epochs)
        _check_at_least_one("--batch-size", self.batch_size)

    @property
    def preset_name(self) -> str:
        """The preset, with its default resolved."""
        if self.preset is not None:
            return self.preset
        return "demo" if self.images.train is None else "imagenet"

    @property
    def protocol(self) -> LinearProtocol:
        """The preset, with the number of epochs and the milestones of the command line."""
        protocol = LINEAR[self.preset_name]
        if self.epochs is not None:
            protocol = protocol._replace(epochs=self.epochs)
        if self.milestones is not None:
            protocol = protocol._replace(milestones=self.milestones)
        return protocol

    def heads(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each classifier, as the optimizer uses them."""
        protocol = self.protocol
        learning_rates = [protocol.lr]
        weight_decays = [protocol.weight_decay]
        if self.sweep:
            learning_rates = [factor * protocol.lr for factor in (1 / 3, 1, 10 / 3, 10)]
            weight_decays = [0.0, 1e-6, 1e-4]
        if self.lr:
            learning_rates = list(self.lr)
        if self.weight_decay:
            weight_decays = list(self.weight_decay)

        scale = self.batch_size / 256 if protocol.lr_scales else 1.0
        return [(lr * scale, decay) for lr, decay in product(learning_rates, weight_decays)]

    def published(self) -> Published:
        """The published result of the preset, and the complete set-up in which it was measured."""
        name = self.preset_name
        protocol = LINEAR["imagenet" if name == "demo" else name]
        training = {"batch": 256, "precision": "float32", "classifiers tried": 1}
        setup = protocol.published.setup | training | protocol.setup
        return protocol.published._replace(setup=setup)


@dataclass(frozen=True)
class SemisupCommand:
    """Fine-tune on few labels.

    Published on ImageNet: top-1 55.0, top-5 79.2 with 1%; 69.7, 89.3 with 10%.
    """

    network: NetworkConfig
    images: ImagesConfig
    labels: str = "0.1"
    """Fraction of the labels to use per class (random, by --seed).
    Or a text file with one image name per line, such as SimCLR's 1percent.txt."""
    preset: Annotated[Literal["paper", "authors", "demo"] | None, experiment.DEFAULT_IN_HELP] = None
    """paper: the paper's learning rates, which fall to a fifth after epochs 12 and 16.
    authors: those of the authors' code, which follow a cosine.
    demo: as paper, in batches of 32.
    [default: demo for the demo data set, else paper]"""
    epochs: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Number of passes over the labelled images [default: 20]."""
    batch_size: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Images per step [default: 256; 32 for demo]."""
    lr: Annotated[float | None, experiment.DEFAULT_IN_HELP] = None
    """Learning rate of the classifier [default: 0.5]."""
    backbone_lr: Annotated[float | None, experiment.DEFAULT_IN_HELP] = None
    """Learning rate of the backbone [default: 0.002; 0.005 for authors]."""
    resume: bool = False
    """Resume an interrupted training after its last finished epoch."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()
        self.images.check()
        protocol = self.protocol
        for option, rate in (("--lr", protocol.lr), ("--backbone-lr", protocol.backbone_lr)):
            experiment.check_option(option, rate, _is_valid_rate(rate), "finite and above 0")
        _check_at_least_one("--epochs", protocol.epochs)
        _check_at_least_one("--batch-size", protocol.batch_size)

    @property
    def protocol(self) -> SemisupProtocol:
        """The preset, with the values of the command line."""
        default = "demo" if self.images.train is None else "paper"
        options = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "backbone_lr": self.backbone_lr,
        }
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        return SEMISUP[self.preset or default]._replace(**given)

    def published(self, fraction: float) -> Published | None:
        """The published result for this fraction of labelled images, if there is one."""
        published = SEMISUP_PUBLISHED.get(round(100 * fraction))
        if published is None:
            return None
        return published._replace(setup=published.setup | SEMISUP["paper"].setup)


@dataclass(frozen=True)
class SvmCommand:
    """Train a linear SVM for each class of VOC2007 on frozen features. Published: 86.2 mAP."""

    network: NetworkConfig
    voc07: Annotated[Path | None, experiment.DEFAULT_IN_HELP] = None
    """Folder that contains VOCdevkit, the development kit.
    [default: a small VOC-like set generated from demo images]"""
    decoder: experiment.DecoderName = "auto"
    """auto: DALI on a GPU, else cpu."""
    threads: Annotated[int | None, experiment.DEFAULT_IN_HELP] = None
    """Number of decoding threads, and of processes that fit SVMs [default: one per core]."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()
        _check_threads(self.threads)


@dataclass(frozen=True)
class PredictCommand:
    """Print the class of each image, by the checkpoint's classifier or by a kNN vote."""

    images: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")
    ] = ()
    """Images [default: a few test images of the demo data set]."""
    network: NetworkConfig = NetworkConfig()
    train: Annotated[Path | None, experiment.DEFAULT_IN_HELP] = None
    """Labelled images for the kNN vote, used if the checkpoint has no classifier.
    --neighbours shows the nearest of these images. At most 50,000 of them are used.
    [default for the demo run: the demo data set]"""
    neighbours: bool = False
    """Show the five nearest training images of each image."""
    json: bool = False
    """Print JSON, and nothing else."""
    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """Each neighbour votes with weight exp(cosine similarity / temperature)."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()
        _check_vote(self.k, self.temperature)
        if not self.images and not self.network.is_demo_run:
            raise ValueError("name images to predict: evaluate.py predict --checkpoint W IMAGE...")


@dataclass(frozen=True)
class ExportCommand:
    """Write the weights in the layout of another project."""

    network: NetworkConfig
    to: Literal[
        "torchvision", "timm", "mmpretrain", "solo-learn", "lightly", "detectron2", "safetensors"
    ] = "torchvision"
    """Layout of the weights: the names of the tensors and the format of the file."""

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        self.network.check()


@dataclass(frozen=True)
class CompareCommand:
    """Print one table of the results of several networks, beside the published results."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")] = (DEMO_RUN,)
    """Folders with results."""

    def check(self) -> None:
        """Accept everything: `comparison.compare` raises for a folder without results."""


Command = (
    Annotated[KnnCommand, subcommand("knn")]
    | Annotated[LinearCommand, subcommand("linear")]
    | Annotated[SemisupCommand, subcommand("semisup")]
    | Annotated[SvmCommand, subcommand("svm")]
    | Annotated[PredictCommand, subcommand("predict")]
    | Annotated[ExportCommand, subcommand("export")]
    | Annotated[CompareCommand, subcommand("compare")]
)


def parse(arguments: Sequence[str] | None = None) -> Command:
    """The command of the command line, or of `arguments`; exits with usage if it is not valid."""
    command: Command = tyro.cli(
        Command,
        args=sys.argv[1:] if arguments is None else arguments,
        prog="evaluate.py",
        description="Evaluate the features of pretrained weights, and use them to predict.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return command


def _check_threads(threads: int | None) -> None:
    experiment.check_option("--threads", threads, threads is None or threads >= 1, "at least 1")


def _check_vote(k: int, temperature: float) -> None:
    _check_at_least_one("--k", k)
    experiment.check_option("--temperature", temperature, temperature > 0, "above 0")


def _check_at_least_one(option: str, value: int) -> None:
    experiment.check_option(option, value, value >= 1, "at least 1")


def _is_valid_rate(rate: float) -> bool:
    return 0 < rate < math.inf
