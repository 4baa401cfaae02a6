"""Presets have the published values, and the command line answers at once."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from experiment.presets import PRESETS, parse
from tests.helpers.runs import TRAIN

# The authors' number of GPUs divides what LARS does not adapt: its learning rate, or the loss
# (docs/method.md, "The scale of the gradient").
PUBLISHED: dict[str, dict[str, object]] = {
    "imagenet-1000e": {
        "batch_size": 2048,
        "epochs": 1000,
        "lr": 0.2,
        "lr_biases": 0.0048 / 32,
        "loss_scale": 1.0,
        "weight_decay": 1.5e-6,
        "lambd": 5e-3,
        "eta": 0.001,
        "momentum": 0.9,
        "clip_lr": False,
        "projector": "8192-8192-8192",
        "backbone": "resnet50",
        "warmup_epochs": 10,
        "lr_end": 0.001,
        "size": 224,
        "crop_area": (0.08, 1.0),
        "blur_p": (1.0, 0.1),
        "solarize_p": (0.0, 0.2),
        "width": 64,
    },
    "imagenet-300e": {
        "batch_size": 8 * 256,
        "epochs": 300,
        "lr": 1.6 / 8,
        "lr_biases": 1.6 / 8 * 0.024 / 8,
        "loss_scale": 1.0,
        "weight_decay": 1e-6,
        "lambd": 0.0051,
        "eta": 0.001,
        "clip_lr": False,
        "projector": "8192-8192-8192",
        "backbone": "resnet50",
        "warmup_epochs": 10,
        "warmup_start": 1.6e-4,
        "lr_end": 0.0016 / 1.6,
    },
    "imagenet-100e": {
        "batch_size": 4 * 64,
        "epochs": 100,
        "lr": 0.8,
        "lr_biases": 0.8,
        "loss_scale": 0.048 / 4,
        "weight_decay": 1.5e-6,
        "projector": "4096-4096-4096",
        "backbone": "resnet50",
        "warmup_start": 3e-5 / 0.8,
    },
    "imagenet100-400e": {
        "batch_size": 2 * 128,
        "epochs": 400,
        "lr": 0.3,
        "lr_biases": 0.3,
        "loss_scale": 0.1 / 2,
        "weight_decay": 1e-4,
        "eta": 0.02,
        "clip_lr": True,
        "projector": "2048-2048-2048",
        "backbone": "resnet18",
        "warmup_start": 3e-5 / 0.3,
        "size": 224,
        "small_stem": False,
    },
    "cifar10-1000e": {
        "batch_size": 256,
        "epochs": 1000,
        "lr": 0.3,
        "lr_biases": 0.3,
        "loss_scale": 0.1,
        "weight_decay": 1e-4,
        "eta": 0.02,
        "clip_lr": True,
        "projector": "2048-2048-2048",
        "backbone": "resnet18",
        "small_stem": True,
        "size": 32,
        "blur_p": (0.0, 0.0),
        "solarize_p": (0.0, 0.2),
    },
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_has_the_published_values(name: str) -> None:
    parsed_name, config = parse([name, "--data", "photos", "--seed", "5"])
    assert (parsed_name, config.data.data, config.run.seed) == (name, Path("photos"), 5)
    config.check()
    values = vars(config.data) | vars(config.model) | vars(config.optim)
    expected = PUBLISHED.get(name, {"size": 48})
    assert {key: values[key] for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in expected.items()
    }


def test_every_published_preset_is_checked() -> None:
    assert PUBLISHED.keys() | {"demo"} == PRESETS.keys()


@pytest.mark.parametrize(
    ("arguments", "name", "batch_size"),
    [
        ("", "demo", 128),
        ("--data photos", "demo", 128),
        ("imagenet-100e --data demo", "imagenet-100e", 256),
        ("--data imagenet-100e", "demo", 128),
        ("--run imagenet-300e --data x --batch-size 64", "demo", 64),
        ("imagenet-300e --data x --batch-size 64", "imagenet-300e", 64),
    ],
)
def test_only_the_first_argument_names_a_preset(arguments: str, name: str, batch_size: int) -> None:
    parsed_name, config = parse(arguments.split())
    assert (parsed_name, config.optim.batch_size) == (name, batch_size)


def test_only_the_demo_preset_uses_the_demo_images() -> None:
    assert [name for name, make_config in PRESETS.items() if make_config().data.demo_data] == [
        "demo"
    ]
    with pytest.raises(SystemExit):
        parse(["imagenet-100e", "--demo-data"])


def test_the_run_folder_has_two_names() -> None:
    for option in ("--run-folder", "--run"):
        assert parse([option, "runs/a"])[1].run.run == Path("runs/a")


def test_help_is_there_in_two_seconds_and_without_torch() -> None:
    code = (
        "import atexit, runpy, sys; sys.argv = ['train.py', '--help'];"
        "heavy = {'torch', 'torchvision', 'numpy'};"
        "atexit.register(lambda: print('loaded', sorted(heavy & sys.modules.keys())));"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("loaded []\n")
    for option in ("data", "epochs", "lambd", "device", "resume"):
        assert f"--{option}" in result.stdout
    assert "pixels" in result.stdout, "units"
    assert "--demo-data" not in result.stdout
    # Processor time, since other work on the machine does not change it.
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 2
