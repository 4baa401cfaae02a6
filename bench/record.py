"""What a measurement leaves behind: a typed record with everything needed to judge it, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiment

if TYPE_CHECKING:
    import torch

SCHEMA = 1
_ROOT = Path(__file__).parent.parent
_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")
_DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "simplejpeg",
    "numba",
    "numpy",
    "pillow",
)


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
    on: str  # what it keeps busy: "cores", "one core", "GPU", "disk" or "bus"
    ceiling: float | None = None  # images/s that it could come to at most, measured in the same run
    ceiling_is: str = ""
    ranks: list[Rates] = field(default_factory=list)  # under torchrun: of each rank while all work
    alone: Rates | None = None  # and of the first rank while the others wait

    @property
    def total(self) -> float:
        """Images/s of all ranks together."""
        return sum(rates.median for rates in self.ranks or [self.rates])

    @property
    def contention(self) -> float:
        """What a rank loses to the others, as a fraction of what the first does alone: below 0 where that is noise."""
        return 1 - self.total / len(self.ranks) / self.alone.median if self.alone else 0.0


@dataclass(frozen=True)
class Contender:
    """A way from encoded images to two finished views, on one core, in turns with the others."""

    name: str
    differs: str  # from the paper's distortions
    versions: dict[str, str]
    rates: Rates
    ratio: float  # of its rate to that of the authors' transform: the median over the turns


@dataclass(frozen=True)
class Step:
    """A way to take the training step, or to compute the loss and its gradients, in turns with the others."""

    name: str
    against: str  # the name of the one that it is compared with
    precision: str
    batch_size: int
    rates: Rates
    ratio: (
        float | None
    )  # of its rate to the other's: the median over the turns; None where the other has none
    memory_gib: (
        float | None
    )  # that it allocates at most, beside the views; None where that was not measured

    @property
    def ms(self) -> float:
        return 1000 * self.batch_size / self.rates.median


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
    steps: list[Step] = field(default_factory=list)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        experiment.write_json(path, dataclasses.asdict(self))


def read(path: Path) -> Record:
    """The record in a file; ValueError where it is none, or of another schema."""
    try:
        values = json.loads(path.read_bytes())
        schema = values["schema"]
        if schema == SCHEMA:
            return _record(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no record of the bench ({error!r})") from None
    raise ValueError(f"{path} has schema {schema}, this program reads {SCHEMA}: measure again")


def _record(values: dict[str, Any]) -> Record:
    def rung(of: dict[str, Any]) -> Rung:
        alone = of["alone"] and Rates(**of["alone"])
        return Rung(
            **{
                **of,
                "rates": Rates(**of["rates"]),
                "ranks": [Rates(**r) for r in of["ranks"]],
                "alone": alone,
            }
        )

    def contender(of: dict[str, Any]) -> Contender:
        return Contender(**{**of, "rates": Rates(**of["rates"])})

    def step(of: dict[str, Any]) -> Step:
        return Step(**{**of, "rates": Rates(**of["rates"])})

    parts: dict[str, Any] = {
        "machine": Machine(**values["machine"]),
        "data": Data(**values["data"]),
    }
    parts |= {
        "rungs": list(map(rung, values["rungs"])),
        "contenders": list(map(contender, values["contenders"])),
    }
    parts |= {
        "steps": list(map(step, values.get("steps", [])))
    }  # which earlier records do not have
    return Record(**{**values, **parts})


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
    import pipeline

    limit, driver = gpu_settings(device) if device.type == "cuda" else (None, None)
    return Machine(
        cpu=_cpu_name(),
        cores=pipeline.usable_cores(),
        memory_gib=round(memory_gib(), 1),
        gpu=pipeline.describe_device(device) if device.type == "cuda" else None,
        gpu_power_limit_w=limit,
        gpu_driver=driver,
        system=f"{platform.system()} {platform.machine()}",
    )


def memory_gib() -> float:
    """Of the machine, or what its control group grants."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        granted = int(_MEMORY_MAX.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        granted = physical
    return min(physical, granted) / 2**30


def gpu_settings(device: torch.device) -> tuple[float | None, str | None]:
    """Power limit in watts and driver release, as nvidia-smi says; None for what it does not say."""
    import torch

    # By its UUID: nvidia-smi counts all GPUs of the machine, torch those in CUDA_VISIBLE_DEVICES.
    name = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    said = _output(
        [
            "nvidia-smi",
            "--query-gpu=power.limit,driver_version",
            "--format=csv,noheader,nounits",
            name,
        ]
    )
    limit, _, driver = said.strip().partition(", ")
    try:
        return float(limit), driver or None
    except ValueError:  # some have no power limit
        return None, driver or None


def commit() -> str:
    """The commit of this checkout, with a plus where files of it have been changed since."""
    git = ["git", "-C", str(_ROOT)]
    if (
        _output([*git, "rev-parse", "--show-prefix"]) != "\n"
    ):  # no checkout, or a folder in somebody else's
        return "unknown"
    name = _output([*git, "rev-parse", "--short=12", "HEAD"]).strip()
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"]).strip()
    return name + ("+" if changed else "") if name else "unknown"


def command(arguments: Sequence[str], world: int = 1) -> str:
    """What was typed, without the folders in it."""
    program = "python -m bench" if world == 1 else f"torchrun --nproc-per-node {world} -m bench"
    return " ".join([program, *map(_without_folders, arguments)])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return (
        option
        + equals
        + (Path(value).resolve().name if "/" in value or value in (".", "..") else value)
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
