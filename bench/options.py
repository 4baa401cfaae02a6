"""The options of `python -m bench`. Nothing here loads torch: `--help` is answered at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiment import DEFAULT_IN_HELP, PRESETS, DecoderName, check_option


@dataclass(frozen=True)
class BenchOptions:
    """Measures every stage from disk to update, and how fast other projects' pipelines make views.

    Other commands, each with its own --help:
    `python -m bench step`: the training step alone.
    `python -m bench convert`: conversions to record files.
    `python -m bench report`: results as tables and a plot.
    `python -m bench doctor`: what is installed, and what is missing.
    """

    data: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Folder of images [default: generated photographs of 500 x 375 pixels and 96 kB, about the
    size of ImageNet's]."""
    images: int = 1024
    """Largest number of images of --data to use.
    Without --data, 512 are generated (fewer if this is lower), or 128 with --quick."""
    size: int = 224
    """Height and width of a view, in pixels."""
    batch_size: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Images per step [default: 64 on a CPU, 32 with --quick, 512 on a GPU]."""
    preset: Annotated[Literal[tuple(PRESETS)] | None, DEFAULT_IN_HELP] = None  # type: ignore[valid-type]
    """Preset that defines the network [default: demo on a CPU, imagenet-1000e on a GPU]."""
    decoder: DecoderName = "auto"
    """auto: DALI on a GPU, else cpu. ffcv: FFCV's loader, for a beton."""
    threads: Annotated[int | None, DEFAULT_IN_HELP] = None
    """Threads that decode [default: one per core, divided by the number of ranks on this
    machine]."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Fewer and shorter measurements: about a minute on two cores."""
    peers: bool = True
    """Measure other projects' pipelines as well, on one core."""
    json: Annotated[Path | None, DEFAULT_IN_HELP] = None
    """Write the results to this JSON file."""

    def check(self) -> None:
        """Raise ValueError for options that nothing can be measured with."""
        check_at_least("--images", self.images, 2)
        check_at_least("--size", self.size, 1)
        check_at_least("--threads", self.threads, 1)
        check_at_least("--batch-size", self.batch_size, 2)  # batch statistics need two images
        check_writable("--json", self.json)


def parse(arguments: list[str]) -> BenchOptions:
    """Parse and check the command line of `python -m bench`."""
    options = tyro.cli(BenchOptions, args=arguments, prog="python -m bench")
    options.check()
    return options


def check_at_least(option: str, value: int | None, minimum: int) -> None:
    """Raise ValueError if an option is given and below its minimum."""
    valid = value is None or value >= minimum
    check_option(option, value, valid, f"at least {minimum}")


def check_writable(option: str, path: Path | None) -> None:
    """Raise ValueError if an option names a file that cannot be written."""
    if path is None:
        return
    folder_is_writable = os.access(path.absolute().parent, os.W_OK)
    valid = folder_is_writable and not path.is_dir()
    check_option(option, path, valid, "a writable path in an existing folder")
