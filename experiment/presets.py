"""Named, typed configurations of pretraining. `train.py NAME --help` shows all fields with their units.

Learning rates are for a batch of 256 and scale with the batch. Here the gradient is the true one of the global batch.
The published settings were tuned on W GPUs with gradients W times too small (docs/method.md, "The scale of the
gradient"): `lr_biases`, or `loss_scale` where weight decay matters as well, are theirs divided by W.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .command import is_rank0
from .options import DecoderName


@dataclass(frozen=True)
class DataConfig:
    """What is seen, and how it is distorted."""

    data: Path | None = None
    """Folder of images (sub-folders are classes, if any), .beton, or folder of .tar or .tfrecord; train and val (or
    test) in a folder, as folders or .beton, are those splits. Without it, `demo` draws its own."""
    hold_out: float = 0.1
    """Fraction of labelled images kept for the final kNN test where the folder has no test split."""
    shuffle_block: int | None = None
    """Images that are read on end, for records larger than the memory or on a disk that seeks; `python -m bench` names
    a number. Blocks are shuffled, and 16 at a time mixed [default: any image is followed by any other]."""
    size: int = 224
    """Side of a view, pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of the random crops, fractions of the image's area."""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur in view a and b."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels of the view."""
    solarize_p: tuple[float, float] = (0.0, 0.2)
    """Probability of solarisation in view a and b."""


@dataclass(frozen=True)
class ModelConfig:
    """The network and its loss."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """torchvision's network."""
    width: int = 64
    """Channels of its first stage."""
    small_stem: bool = False
    """3x3 stride-1 first convolution and no max-pool, for 32-pixel images."""
    projector: str = "8192-8192-8192"
    """Widths of the projector's linear layers."""
    lambd: float = 0.0051
    """Weight of the redundancy term."""
    loss_scale: float = 1.0
    """Factor on the loss; acts on what LARS does not adapt."""


@dataclass(frozen=True)
class OptimConfig:
    """LARS and its schedule."""

    epochs: int = 1000
    batch_size: int = 2048
    """Images a step."""
    lr: float = 0.2
    """Peak learning rate of weights, x batch / 256."""
    lr_biases: float = 0.0048 / 32
    """Peak learning rate of biases and batch norm, x batch / 256: the paper's 0.0048 over its 32 GPUs."""
    weight_decay: float = 1e-6
    momentum: float = 0.9
    eta: float = 0.001
    """LARS's trust coefficient."""
    clip_lr: bool = False
    """Bound LARS's rates as solo-learn does."""
    warmup_epochs: float = 10
    warmup_start: float = 0.0
    """Learning rate of the first step, fraction of the peak."""
    lr_end: float = 0.001
    """Learning rate that the cosine falls to, fraction of the peak."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how it runs; nothing here changes what is learned, but `seed` and `precision`."""

    run: Annotated[Path | None, tyro.conf.arg(name="run-folder", aliases=["--run"])] = None
    """Folder of the run [default: runs/PRESET]. What an earlier run left there is kept under another number."""
    resume: bool = False
    """Go on with the run in that folder, from its last checkpoint, on any number of GPUs."""
    resume_if_saved: bool = False
    """The same where there is a checkpoint, else begin: for a job that a scheduler starts again."""
    continue_from: Path | None = None
    """Begin with the network in a pretraining checkpoint of another project; with the authors' checkpoint.pth, go on
    from its epoch, with its momenta."""
    accept_changes: bool = False
    """Resume although the configuration is not the one that was saved."""
    dry_run: bool = False
    """Two steps, and nothing left behind but the memory, largest batch and hours to expect."""
    seed: int = 0
    """Decides initial weights, order and distortions."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    decoder: DecoderName = "auto"
    """auto: DALI on a GPU, else cpu. ffcv: FFCV's loader, for a beton."""
    hw_decoder_load: float = 0.65
    """Fraction of the images that DALI gives to the GPU's JPEG engine, where it has one [DALI's default: 0.65]."""
    threads: int | None = None
    """Threads that decode [default: one a core]."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network; the loss is always float32. auto: bfloat16 (or float16) on a GPU, float32 on a CPU. float32 on a
    GPU multiplies in TF32."""
    compile: Literal[
        "auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = "auto"
    """torch.compile's mode; auto: default on a GPU, off on a CPU, where it takes a minute."""
    deterministic: bool = False
    """The same bits each time on a GPU too, at some cost in speed. (On a CPU they are.)"""
    recompute: bool = False
    """Compute the backbone's activations again in the backward pass: a quarter is kept, for a third more work."""
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3
    """The last ones that are kept."""
    milestone_epochs: int | None = None
    """A checkpoint that is kept for good every so many epochs [default: none]."""
    log_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_epochs: int | None = None
    """Epochs between two tests on held-out images, by kNN and a linear probe [default: one kNN test at the end]."""


@dataclass(frozen=True)
class Pretrain:
    """One pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self, ranks: int = 1) -> None:
        """ValueError for what no run can be made of, on so many ranks."""
        batch, resumes = self.optim.batch_size, self.run.resume or self.run.resume_if_saved
        continues = self.run.continue_from is not None
        area, sigma, block = self.data.crop_area, self.data.blur_sigma, self.data.shuffle_block
        wrong = {
            "--warmup-epochs": (
                self.optim.warmup_epochs,
                self.optim.warmup_epochs >= 0,
                "at least 0",
            ),
            "--lr": (
                self.optim.lr,
                0 <= self.optim.lr < float("inf"),
                "a finite number, at least 0",
            ),
            "--lr-biases": (
                self.optim.lr_biases,
                0 <= self.optim.lr_biases < float("inf"),
                "finite, at least 0",
            ),
            "--checkpoint-minutes": (
                self.run.checkpoint_minutes,
                self.run.checkpoint_minutes >= 0,
                "at least 0",
            ),
            "--epochs": (self.optim.epochs, self.optim.epochs >= 1, "at least 1"),
            "--batch-size": (
                batch,
                batch >= 2 and batch % ranks == 0,
                f"a multiple of the {ranks} ranks"
                if batch >= 2
                else "at least 2, for batch statistics",
            ),
            "--shuffle-block": (block, block is None or block >= 1, "at least 1"),
            "--size": (self.data.size, self.data.size >= 1, "at least 1 pixel"),
            "--hold-out": (self.data.hold_out, 0 < self.data.hold_out < 1, "between 0 and 1"),
            "--crop-area": (area, 0 < area[0] <= area[1] <= 1, "a range in (0, 1]"),
            "--blur-p": (
                self.data.blur_p,
                all(0 <= p <= 1 for p in self.data.blur_p),
                "two probabilities",
            ),
            "--solarize-p": (
                self.data.solarize_p,
                all(0 <= p <= 1 for p in self.data.solarize_p),
                "two probabilities",
            ),
            "--blur-sigma": (sigma, 0 < sigma[0] <= sigma[1], "a range above 0"),
            "--seed": (self.run.seed, 0 <= self.run.seed < 2**63, "from 0 to 2^63 - 1"),
            "--continue-from": (
                "given with --resume",
                not (self.run.resume and continues),
                "for a new run",
            ),
            "--dry-run": (
                "given with --resume or --continue-from",
                not (self.run.dry_run and (resumes or continues)),
                "given alone",
            ),
            "--hw-decoder-load": (
                self.run.hw_decoder_load,
                0 <= self.run.hw_decoder_load <= 1,
                "from 0 to 1",
            ),
            "--threads": (
                self.run.threads,
                self.run.threads is None or self.run.threads >= 1,
                "at least 1",
            ),
            "--log-steps": (self.run.log_steps, self.run.log_steps >= 1, "at least 1"),
            "--keep-checkpoints": (
                self.run.keep_checkpoints,
                self.run.keep_checkpoints >= 1,
                "at least 1",
            ),
            "--milestone-epochs": (
                self.run.milestone_epochs,
                (self.run.milestone_epochs or 1) >= 1,
                "at least 1",
            ),
            "--eval-epochs": (self.run.eval_epochs, (self.run.eval_epochs or 1) >= 1, "at least 1"),
        }
        for option, (value, good, bound) in wrong.items():
            if not good:
                raise ValueError(f"{option} is {value}: it must be {bound}")

    def settings(self) -> dict[str, Any]:
        """All that decides what is learned, as plain values: what a checkpoint must agree with to be resumed."""
        settings = asdict(self.data) | asdict(self.model) | asdict(self.optim)
        del settings["data"]  # the folder may have moved; its contents are compared instead
        settings |= {"seed": self.run.seed, "precision": self.run.precision}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }


def demo() -> Pretrain:
    """The embedded data set on whatever machine this is, in a few minutes: a narrow ResNet-18 at 48 pixels."""
    blur = (0.1 * 48 / 224, 2.0 * 48 / 224)  # as wide as the paper's, seen from as far away
    return Pretrain(
        DataConfig(size=48, blur_sigma=blur),
        ModelConfig(backbone="resnet18", width=16, projector="512-512-512"),
        OptimConfig(epochs=16, batch_size=128, lr=0.8, lr_biases=0.006, eta=0.02, warmup_epochs=2),
    )


def imagenet_1000e() -> Pretrain:
    """The paper's run (Zbontar et al. 2021). Published: linear 73.2 top-1, 91.0 top-5.

    train.py imagenet-1000e --data IMAGENET. The authors took 124 h on 32 V100.
    """
    return Pretrain(model=ModelConfig(lambd=5e-3), optim=OptimConfig(weight_decay=1.5e-6))


def imagenet_300e() -> Pretrain:
    """mmpretrain's barlowtwins_resnet50_8xb256-coslr-300e_in1k. Published: linear 71.80 top-1.

    train.py imagenet-300e --data IMAGENET. It ran on 8 GPUs in float32.
    """
    return Pretrain(optim=OptimConfig(epochs=300, lr_biases=0.0048 / 8, warmup_start=1.6e-4))


def imagenet_100e() -> Pretrain:
    """solo-learn's ImageNet run on 4 GPUs. Published: linear 67.23 top-1 (67.18 online).

    train.py imagenet-100e --data IMAGENET
    """
    return Pretrain(
        model=ModelConfig(projector="4096-4096-4096", loss_scale=0.048 / 4),
        optim=OptimConfig(
            epochs=100,
            batch_size=256,
            lr=0.8,
            lr_biases=0.8,
            weight_decay=1.5e-6,
            warmup_start=3e-5 / 0.8,
            lr_end=0.0,
        ),
    )


def imagenet100_400e() -> Pretrain:
    """solo-learn's ImageNet-100 run, ResNet-18 on 2 GPUs. Published: top-1 80.38 online, 80.16 offline.

    train.py imagenet100-400e --data IMAGENET100
    """
    return Pretrain(
        model=ModelConfig(backbone="resnet18", projector="2048-2048-2048", loss_scale=0.1 / 2),
        optim=_solo_lars(epochs=400),
    )


def cifar10_1000e() -> Pretrain:
    """solo-learn's CIFAR-10 run: ResNet-18 with a small stem, no blur. Published: top-1 92.10 online.

    Its stem adds a border of 2 pixels, ours, like all others', 1.

    train.py cifar10-1000e --data CIFAR10, a folder of its images with train/ and test/ in it.
    """
    return Pretrain(
        DataConfig(size=32, blur_p=(0.0, 0.0)),
        ModelConfig(
            backbone="resnet18", small_stem=True, projector="2048-2048-2048", loss_scale=0.1
        ),
        _solo_lars(epochs=1000),
    )


def _solo_lars(epochs: int) -> OptimConfig:
    return OptimConfig(
        epochs=epochs,
        batch_size=256,
        lr=0.3,
        lr_biases=0.3,
        weight_decay=1e-4,
        eta=0.02,
        clip_lr=True,
        warmup_start=1e-4,  # 3e-5
        lr_end=0.0,
    )


PRESETS = {
    make.__name__.replace("_", "-"): make
    for make in (
        demo,
        imagenet_1000e,
        imagenet_300e,
        imagenet_100e,
        imagenet100_400e,
        cifar10_1000e,
    )
}


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Pretrain]:
    """The name of the preset (`demo` where none is named) and its configuration, from the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments and arguments[0] in PRESETS else "demo"
    presets = tyro.extras.subcommand_type_from_defaults(
        {preset: make() for preset, make in PRESETS.items()},
        {preset: inspect.getdoc(make) or "" for preset, make in PRESETS.items()},
    )
    config = tyro.cli(
        presets,
        args=arguments,
        default=PRESETS[name](),
        description="Pretrain with Barlow Twins. Without a preset: demo.",
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes),
        console_outputs=is_rank0(),
    )
    return name, config
