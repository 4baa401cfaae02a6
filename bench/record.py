"""What a measurement leaves behind: a typed record with everything needed to judge it, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import runlog
from pipeline import usable_cores

SCHEMA = 1
_DISTRIBUTIONS = ("torch", "torchvision", "nvidia-dali-cuda130", "simplejpeg", "numba", "numpy", "pillow")


@dataclass(frozen=True)
class Rates:
    """Two-view images per second, measured several times over."""

    images_per_s: list[float]  # one for each repeat

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def spread(self) -> float:
        """Half the range of the repeats, as a fraction of their median."""
        return (max(self.images_per_s) - min(self.images_per_s)) / 2 / self.median


@dataclass(frozen=True)
class Rung:
    """One part of the way from disk to update, or several."""

    name: str
    what: str
    rates: Rates  # of the first rank, while all ranks work
    on: str  # "cores" or "gpu": what it keeps busy
    ceiling: float | None = None  # images/s that it cannot exceed, measured in the same run
    ceiling_is: str = ""
    ranks: list[Rates] = field(default_factory=list)  # under torchrun: of each rank while all work
    alone: Rates | None = None  # and of the first rank while the others wait


@dataclass(frozen=True)
class Contender:
    """A way from encoded images to two finished views, on one core, in turns with the others."""

    name: str
    differs: str  # from the paper's distortions
    versions: dict[str, str]
    rates: Rates
    ratio: float  # of its rate to that of the authors' transform: the median over the turns


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int  # that may be used
    memory_gib: float
    gpu: str | None
    gpu_power_limit_w: float | None
    gpu_driver: str | None
    system: str


@dataclass(frozen=True)
class Data:
    name: str
    images: int  # that took part
    mean_bytes: float
    mean_width: float
    mean_height: float


@dataclass(frozen=True)
class Record:
    """One run of the bench."""

    command: str
    commit: str
    versions: dict[str, str]
    machine: Machine
    data: Data
    settings: dict[str, Any]
    rungs: list[Rung]
    contenders: list[Contender]
    bounds: dict[str, float]  # images/s that each resource could feed or train at most
    verdict: list[str]
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        runlog.write_json(path, dataclasses.asdict(self))


def read(path: Path) -> Record:
    """The record in a file; ValueError where it is none, or of another schema."""
    try:
        values = json.loads(path.read_text())
        if values["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {values['schema']}, this program reads {SCHEMA}: measure again")
        rungs = [
            Rung(**rung)
            for rung in (
                rung
                | {"rates": Rates(**rung["rates"]), "ranks": [Rates(**rank) for rank in rung["ranks"]]}
                | {"alone": Rates(**rung["alone"]) if rung["alone"] else None}
                for rung in values["rungs"]
            )
        ]
        contenders = [Contender(**(c | {"rates": Rates(**c["rates"])})) for c in values["contenders"]]
        parts = {"machine": Machine(**values["machine"]), "data": Data(**values["data"])}
        return Record(**(values | parts | {"rungs": rungs, "contenders": contenders}))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no record of the bench ({error})") from None


def versions(distributions: Sequence[str] = _DISTRIBUTIONS) -> dict[str, str]:
    """Of those distributions that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> Machine:
    """What the figures were measured on."""
    limit, driver = gpu_settings(device) if device.type == "cuda" else (None, None)
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gib=round(memory_gib(), 1),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        gpu_power_limit_w=limit,
        gpu_driver=driver,
        system=f"{platform.system()} {platform.machine()}",
    )


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpu_settings(device: torch.device) -> tuple[float | None, str | None]:
    """Power limit in watts and driver release, as nvidia-smi says."""
    query = ["nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader,nounits"]
    said = _output([*query, f"--id={device.index or 0}"]).split(", ")
    try:
        return float(said[0]), said[1].strip()
    except (ValueError, IndexError):
        return None, None


def commit() -> str:
    """The commit of the working tree, with a plus where files of it have been changed since."""
    here = Path(__file__).parent
    name = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]).strip()
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"]).strip()
    return name + ("+" if changed else "") if name else "unknown"


def command() -> str:
    """What was typed, without the folders in it."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python -m bench", *words])


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
