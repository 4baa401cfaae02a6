"""What `python -m bench` can be asked for. Nothing here loads torch: `--help` is answered at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiment.options import DecoderName
from experiment.presets import PRESETS


@dataclass(frozen=True)
class Bench:
    """Where does the throughput go? Measures every rung from disk to update, and the peers beside it.

    `python -m bench report --help`: records as tables and plot. `python -m bench doctor`: what is installed.
    """

    data: Path | None = None
    """Folder of images [default: drawn photographs of 500 x 375 pixels and 97 kB, as ImageNet's are]."""
    images: int = 1024
    """At most so many of them take part."""
    size: int = 224
    """Side of a view, pixels."""
    batch_size: int | None = None
    """Images a step [default: 64 on a CPU, 32 with --quick, 512 on a GPU]."""
    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    """Whose network is trained [default: demo on a CPU, imagenet-1000e on a GPU]."""
    decoder: DecoderName = "auto"
    """auto: DALI on a GPU, else cpu. ffcv: FFCV's loader, for a beton."""
    threads: int | None = None
    """Threads that decode [default: one a core, shared among the ranks of this machine]."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Fewer and shorter measurements: within a minute on two cores."""
    peers: bool = True
    """Measure other pipelines as well, on one core."""
    json: Path | None = None
    """File for the record of this run."""

    def check(self) -> None:
        """ValueError for what cannot be measured."""
        least = {
            "--images": (self.images, 2),
            "--size": (self.size, 1),
            "--threads": (self.threads, 1),
        }
        least["--batch-size"] = self.batch_size, 2  # for batch statistics
        for option, (value, bound) in least.items():
            if value is not None and value < bound:
                raise ValueError(f"{option} is {value}: it must be at least {bound}")
        if self.json and (
            self.json.is_dir() or not os.access(self.json.absolute().parent, os.W_OK)
        ):
            raise ValueError(
                f"--json {self.json} cannot be written: name a file in a folder that is there"
            )


def parse(arguments: list[str]) -> Bench:
    config = tyro.cli(Bench, args=arguments, prog="python -m bench")
    config.check()
    return config
