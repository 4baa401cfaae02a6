"""Published configurations of pretraining by name, and the command line of `train.py`.

Learning rates are for 256 images and are multiplied by batch size / 256. The gradient here is the
true gradient of the global batch. The published settings were tuned on W GPUs with gradients that
were W times too small (docs/method.md, "The scale of the gradient"). A preset therefore divides
the published value of `lr_biases` by W, or that of `loss_scale` if weight decay matters as well.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import tyro

from .config import DataConfig, ModelConfig, OptimConfig, Pretrain
from .entry_point import is_rank0


def demo() -> Pretrain:
    """A narrow ResNet-18 on 48-pixel views of generated demo images; a few minutes anywhere."""
    # The paper's blur, relative to the size of a view.
    blur_sigma = (0.1 * 48 / 224, 2.0 * 48 / 224)
    return Pretrain(
        data=DataConfig(demo_data=True, size=48, blur_sigma=blur_sigma),
        model=ModelConfig(backbone="resnet18", width=16, projector="512-512-512"),
        optim=OptimConfig(
            epochs=16,
            batch_size=128,
            lr=0.8,
            lr_biases=0.006,
            eta=0.02,
            warmup_epochs=2,
        ),
    )


def imagenet_1000e() -> Pretrain:
    """The paper's run (Zbontar et al. 2021). Published: linear 73.2 top-1, 91.0 top-5.

    train.py imagenet-1000e --data IMAGENET. The authors took 124 h on 32 V100.
    """
    return Pretrain(
        model=ModelConfig(lambd=5e-3),
        optim=OptimConfig(weight_decay=1.5e-6),
    )


def imagenet_300e() -> Pretrain:
    """mmpretrain's barlowtwins_resnet50_8xb256-coslr-300e_in1k. Published: linear 71.80 top-1.

    train.py imagenet-300e --data IMAGENET. mmpretrain used 8 GPUs and float32.
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
    """solo-learn's ImageNet-100 run: ResNet-18 on 2 GPUs.

    Published: top-1 80.38 online, 80.16 offline.

    train.py imagenet100-400e --data IMAGENET100
    """
    return Pretrain(
        model=ModelConfig(backbone="resnet18", projector="2048-2048-2048", loss_scale=0.1 / 2),
        optim=_solo_learn_optim(epochs=400),
    )


def cifar10_1000e() -> Pretrain:
    """solo-learn's CIFAR-10 run: ResNet-18 with a small stem, no blur.

    Published: top-1 92.10 online.

    train.py cifar10-1000e --data CIFAR10, a folder of its images with train/ and test/ in it.
    The first convolution is padded by 1 pixel; solo-learn uses 2.
    """
    return Pretrain(
        data=DataConfig(size=32, blur_p=(0.0, 0.0)),
        model=ModelConfig(
            backbone="resnet18", small_stem=True, projector="2048-2048-2048", loss_scale=0.1
        ),
        optim=_solo_learn_optim(epochs=1000),
    )


def _solo_learn_optim(epochs: int) -> OptimConfig:
    return OptimConfig(
        epochs=epochs,
        batch_size=256,
        lr=0.3,
        lr_biases=0.3,
        weight_decay=1e-4,
        eta=0.02,
        clip_lr=True,
        warmup_start=1e-4,  # published as a learning rate of 3e-5
        lr_end=0.0,
    )


PRESETS = {
    "demo": demo,
    "imagenet-1000e": imagenet_1000e,
    "imagenet-300e": imagenet_300e,
    "imagenet-100e": imagenet_100e,
    "imagenet100-400e": imagenet100_400e,
    "cifar10-1000e": cifar10_1000e,
}


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Pretrain]:
    """The name of the preset and the configuration that a command line asks for.

    The preset is `demo` unless the first argument names another one.

    Args:
        arguments: The command line without the program's name; by default that of this process.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    name = "demo"
    if arguments and arguments[0] in PRESETS:
        name = arguments[0]

    subcommands = tyro.extras.subcommand_type_from_defaults(
        {preset: make_config() for preset, make_config in PRESETS.items()},
        {preset: inspect.getdoc(make_config) or "" for preset, make_config in PRESETS.items()},
    )
    config = tyro.cli(
        subcommands,
        args=arguments,
        default=PRESETS[name](),
        description="Pretrain a ResNet with Barlow Twins. The default preset is demo.",
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes),
        console_outputs=is_rank0(),
    )
    return name, config
