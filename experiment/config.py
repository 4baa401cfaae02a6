"""The typed configuration of a pretraining run.

The fields are the options of `train.py`, and the text below each is its help. tyro keeps the line
breaks of those texts, so each line is a sentence. `presets.py` has the published configurations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .options import DEFAULT_IN_HELP, DecoderName, check_option


@dataclass(frozen=True)
class DataConfig:
    """The images and the distortions of the two views, a and b."""

    data: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """A folder of images, a .beton file, or a folder of .tar or .tfrecord files.
    Sub-folders named train and val (or test) are used as splits; sub-folders of images are classes.
    [default: generated demo images for the demo preset; the others need --data]"""
    demo_data: tyro.conf.Suppress[bool] = False
    """Use the generated demo images if `data` is None. Not a command-line option."""
    hold_out: float = 0.1
    """Fraction of the labelled images held out for the kNN test if there is no test split."""
    shuffle_block: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Shuffle blocks of this many contiguous images, and mix 16 blocks at a time.
    For record files larger than memory or on a hard disk; `python -m bench` suggests a size.
    [default: shuffle single images]"""
    size: int = 224
    """Height and width of a view, in pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as fractions of the image's area."""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view a and in view b."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize_p: tuple[float, float] = (0.0, 0.2)
    """Probability of solarization in view a and in view b."""


@dataclass(frozen=True)
class ModelConfig:
    """The network and the loss."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Architecture of the backbone, as in torchvision."""
    width: int = 64
    """Channels of the first stage; the standard ResNets have 64."""
    small_stem: bool = False
    """Use a 3x3 first convolution of stride 1 and no max-pooling, for 32-pixel images."""
    projector: str = "8192-8192-8192"
    """Output widths of the projector's linear layers."""
    lambd: float = 0.0051
    """Weight of the redundancy reduction term, lambda in the paper."""
    loss_scale: float = 1.0
    """Multiplies the loss. LARS cancels it for weights.
    It changes only biases, batch norm and the effect of weight decay."""


@dataclass(frozen=True)
class OptimConfig:
    """LARS (You et al. 2017) and the learning rate schedule."""

    epochs: int = 1000
    """Passes over the training set."""
    batch_size: int = 2048
    """Images in each step, on all GPUs together."""
    lr: float = 0.2
    """Peak learning rate of the weights for a batch of 256; scaled by batch size / 256."""
    lr_biases: float = 0.0048 / 32
    """Peak learning rate of biases and batch norm for a batch of 256; scaled as --lr is.
    In imagenet-1000e it is the paper's 0.0048 divided by its 32 GPUs (docs/method.md)."""
    weight_decay: float = 1e-6
    """Weight decay of the weights; biases and batch norm have none."""
    momentum: float = 0.9
    """Momentum of all parameters."""
    eta: float = 0.001
    """Trust coefficient of LARS."""
    clip_lr: bool = False
    """Limit the layer-wise rates of LARS to the scheduled learning rate, as solo-learn does."""
    warmup_epochs: float = 10
    """Epochs in which the learning rate rises linearly to its peak."""
    warmup_start: float = 0.0
    """Learning rate of the first step, as a fraction of the peak."""
    lr_end: float = 0.001
    """Learning rate at the end of the cosine decay, as a fraction of the peak."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run is executed.
    The result depends on the seed.
    Device, decoder, precision, compilation and number of cores change only rounding, which still
    changes the weights slightly."""

    run: Annotated[
        Path | None,
        tyro.conf.arg(name="run-folder", aliases=["--run"], help_behavior_hint=""),
    ] = None
    """Folder for the files of the run [default: runs/PRESET].
    An earlier run in that folder is renamed to FOLDER.1, FOLDER.2, ..."""
    resume: bool = False
    """Resume the run in the folder from its last checkpoint, on any number of GPUs."""
    resume_if_saved: bool = False
    """Resume if the folder has a checkpoint, otherwise start a new run.
    For jobs that a scheduler restarts."""
    continue_from: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Start a new run from another project's pretraining checkpoint.
    The authors' checkpoint.pth also provides the epoch and the momentum buffers."""
    accept_changes: bool = False
    """Resume even if the configuration differs from the saved one."""
    dry_run: bool = False
    """Train for two steps, report memory, largest batch and expected hours, and keep no files."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the distortions."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    decoder: DecoderName = "auto"
    """auto: dali on a GPU, otherwise cpu.
    ffcv: FFCV's loader, for .beton files. torchvision: the old name of cpu."""
    hw_decoder_load: float = 0.65
    """Fraction of the images that DALI gives to the GPU's hardware JPEG decoder, if it has one."""
    threads: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Decoding threads of each process.
    [default: the CPU cores divided by the number of processes on the machine]"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the network. The loss is always computed in float32.
    auto: bfloat16 (or float16) on a GPU, float32 on a CPU.
    float32: float32 with TF32 matrix products on a GPU, as with
    torch.set_float32_matmul_precision('high')."""
    compile: Literal[
        "auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = "auto"
    """Mode of torch.compile.
    auto: mode 'default' on a GPU; off on a CPU, where compiling takes about a minute."""
    deterministic: bool = False
    """Make runs on a GPU reproducible to the bit; slower. CPU runs are always reproducible."""
    recompute: bool = False
    """Activation checkpointing in the backbone.
    It keeps about a quarter of the activations, for about a third more computation."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints."""
    keep_checkpoints: int = 3
    """Number of recent checkpoints to keep."""
    milestone_epochs: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Number of epochs between checkpoints that are never deleted [default: none]."""
    log_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_epochs: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Epochs between two evaluations on held-out images by kNN and a linear probe.
    [default: one kNN test at the end]"""


@dataclass(frozen=True)
class Pretrain:
    """The configuration of one pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self, ranks: int = 1) -> None:
        """Raise ValueError for values with which no run on this number of ranks can work."""
        _check_data(self.data)
        _check_schedule(self.optim)
        _check_batch_size(self.optim.batch_size, ranks)
        _check_start(self.run)
        _check_decoding(self.run)
        _check_intervals(self.run)

    def settings(self) -> dict[str, Any]:
        """All settings that decide what is learned, as plain values.

        They are saved in checkpoints, and a run can only be resumed with the same ones.
        """
        settings = {**asdict(self.data), **asdict(self.model), **asdict(self.optim)}
        # The folder may have moved: its contents are compared instead.
        del settings["data"]
        del settings["demo_data"]
        settings["seed"] = self.run.seed
        settings["precision"] = self.run.precision
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }


def _check_data(data: DataConfig) -> None:
    smallest, largest = data.crop_area
    weakest, strongest = data.blur_sigma
    check_option("--hold-out", data.hold_out, 0 < data.hold_out < 1, "between 0 and 1")
    _check_count("--shuffle-block", data.shuffle_block)
    check_option("--size", data.size, data.size >= 1, "at least 1 pixel")
    check_option(
        "--crop-area",
        data.crop_area,
        0 < smallest <= largest <= 1,
        "two numbers in (0, 1], the smaller one first",
    )
    check_option(
        "--blur-sigma",
        data.blur_sigma,
        0 < weakest <= strongest,
        "two numbers above 0, the smaller one first",
    )
    _check_probabilities("--blur-p", data.blur_p)
    _check_probabilities("--solarize-p", data.solarize_p)


def _check_schedule(optim: OptimConfig) -> None:
    _check_count("--epochs", optim.epochs)
    _check_learning_rate("--lr", optim.lr)
    _check_learning_rate("--lr-biases", optim.lr_biases)
    warmup = optim.warmup_epochs
    check_option("--warmup-epochs", warmup, 0 <= warmup < math.inf, "finite and at least 0")


def _check_batch_size(batch_size: int, ranks: int) -> None:
    check_option("--batch-size", batch_size, batch_size >= 2, "at least 2, for batch statistics")
    divides = batch_size % ranks == 0
    check_option("--batch-size", batch_size, divides, f"a multiple of the {ranks} ranks")


def _check_start(run: RunConfig) -> None:
    resumes = run.resume or run.resume_if_saved
    continues = run.continue_from is not None
    check_option(
        "--continue-from",
        "given with --resume",
        not (continues and run.resume),
        "given alone, for a new run",
    )
    check_option(
        "--dry-run",
        "given with --resume or --continue-from",
        not (run.dry_run and (resumes or continues)),
        "given alone",
    )
    check_option("--seed", run.seed, 0 <= run.seed < 2**63, "from 0 to 2^63 - 1")


def _check_decoding(run: RunConfig) -> None:
    load = run.hw_decoder_load
    check_option("--hw-decoder-load", load, 0 <= load <= 1, "from 0 to 1")
    _check_count("--threads", run.threads)


def _check_intervals(run: RunConfig) -> None:
    minutes = run.checkpoint_minutes
    check_option("--checkpoint-minutes", minutes, minutes >= 0, "at least 0")
    _check_count("--keep-checkpoints", run.keep_checkpoints)
    _check_count("--milestone-epochs", run.milestone_epochs)
    _check_count("--log-steps", run.log_steps)
    _check_count("--eval-epochs", run.eval_epochs)


def _check_count(option: str, value: int | None) -> None:
    check_option(option, value, value is None or value >= 1, "at least 1")


def _check_learning_rate(option: str, value: float) -> None:
    check_option(option, value, 0 <= value < math.inf, "finite and at least 0")


def _check_probabilities(option: str, values: tuple[float, float]) -> None:
    valid = all(0 <= p <= 1 for p in values)
    check_option(option, values, valid, "two numbers from 0 to 1")
