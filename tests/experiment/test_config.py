"""The configuration of a run: which values are refused, and which settings a checkpoint keeps."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import pytest

import model
import pipeline
from experiment.config import ModelConfig, RunConfig
from experiment.options import check_option
from experiment.presets import PRESETS, parse

REFUSED = [
    "--hold-out 0",
    "--hold-out 1",
    "--hold-out nan",
    "--shuffle-block 0",
    "--size 0",
    "--crop-area 0 1",
    "--crop-area 0.5 0.4",
    "--crop-area 0.5 1.1",
    "--blur-p 0.5 1.5",
    "--blur-p -0.1 0.5",
    "--solarize-p 0 nan",
    "--blur-sigma 0 1",
    "--blur-sigma 2 1",
    "--epochs 0",
    "--batch-size 1",
    "--lr -1",
    "--lr inf",
    "--lr-biases nan",
    "--warmup-epochs -1",
    "--warmup-epochs inf",
    "--seed -1",
    f"--seed {2**63}",
    "--hw-decoder-load 1.5",
    "--threads 0",
    "--checkpoint-minutes -1",
    "--keep-checkpoints 0",
    "--milestone-epochs 0",
    "--milestone-epochs -1",
    "--log-steps 0",
    "--eval-epochs 0",
    "--eval-epochs -1",
]


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_value_that_cannot_work_is_refused_by_name(arguments: str) -> None:
    option = arguments.split()[0]
    _, config = parse(arguments.split())
    with pytest.raises(ValueError, match=rf"^{option} is .*: it must be "):
        config.check()


@pytest.mark.parametrize(
    "arguments",
    [
        "--hold-out 0.5 --shuffle-block 1 --size 1 --crop-area 1 1",
        "--blur-p 0 1 --solarize-p 1 0 --blur-sigma 0.1 0.1",
        "--epochs 1 --batch-size 2 --lr 0 --lr-biases 0 --warmup-epochs 0",
        f"--seed {2**63 - 1} --hw-decoder-load 0 --threads 1",
        "--checkpoint-minutes 0 --keep-checkpoints 1 --milestone-epochs 1 --log-steps 1",
        "--eval-epochs 1",
        "--milestone-epochs None --eval-epochs None --shuffle-block None --threads None",
        "--resume-if-saved --continue-from other.pth",
    ],
)
def test_the_extreme_values_are_allowed(arguments: str) -> None:
    _, config = parse(arguments.split())
    config.check()


@pytest.mark.parametrize(
    "arguments",
    [
        "--continue-from other.pth --resume",
        "--dry-run --resume",
        "--dry-run --resume-if-saved",
        "--dry-run --continue-from other.pth",
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: str) -> None:
    _, config = parse(arguments.split())
    with pytest.raises(ValueError, match=rf"^{arguments.split()[0]} is given with --resume"):
        config.check()


def test_the_batch_is_divided_among_the_ranks() -> None:
    _, config = parse(["--batch-size", "9"])
    config.check(ranks=3)
    with pytest.raises(
        ValueError, match=r"--batch-size is 9: it must be a multiple of the 2 ranks"
    ):
        config.check(ranks=2)


def test_a_checked_option_names_its_value_and_the_requirement() -> None:
    check_option("--size", 3, True, "at least 1")
    with pytest.raises(ValueError, match=r"^--size is 0: it must be at least 1$"):
        check_option("--size", 0, False, "at least 1")


def test_choices_on_the_command_line_are_those_of_the_other_rooms() -> None:
    def choices(config: type, field: str) -> set[str]:
        return set(get_args(get_type_hints(config)[field]))

    assert choices(ModelConfig, "backbone") == set(model.BACKBONES)
    aliases = {"torchvision"}  # the old name of cpu
    assert choices(RunConfig, "decoder") == {"auto", *pipeline.DECODERS} | aliases


def test_settings_hold_all_that_decides_what_is_learned() -> None:
    """Everything but where the data are and how the run is executed."""
    config = PRESETS["demo"]()
    fields = vars(config.data).keys() | vars(config.model).keys() | vars(config.optim).keys()
    assert config.settings().keys() == fields - {"data", "demo_data"} | {"seed", "precision"}
    assert json.loads(json.dumps(config.settings())) == config.settings()


def test_settings_of_earlier_checkpoints_are_still_the_same() -> None:
    """A key or a value that changes would keep a run from being resumed."""
    assert PRESETS["demo"]().settings() == {
        "hold_out": 0.1,
        "shuffle_block": None,
        "size": 48,
        "crop_area": [0.08, 1.0],
        "blur_p": [1.0, 0.1],
        "blur_sigma": [0.021428571428571432, 0.42857142857142855],
        "solarize_p": [0.0, 0.2],
        "backbone": "resnet18",
        "width": 16,
        "small_stem": False,
        "projector": "512-512-512",
        "lambd": 0.0051,
        "loss_scale": 1.0,
        "epochs": 16,
        "batch_size": 128,
        "lr": 0.8,
        "lr_biases": 0.006,
        "weight_decay": 1e-06,
        "momentum": 0.9,
        "eta": 0.02,
        "clip_lr": False,
        "warmup_epochs": 2,
        "warmup_start": 0.0,
        "lr_end": 0.001,
        "seed": 0,
        "precision": "auto",
    }
