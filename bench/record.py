"""The record of a benchmark: a typed result with everything needed to judge it, stored as JSON.

A `Record` holds the command, the commit, the versions, the machine and the data, and what was
measured: stages and peers (`python -m bench`), conversions (`python -m bench convert`) or training
steps (`python -m bench step`). Every measurement is a list of `Rates`, one for each repeat.

`tables.py` prints a record at the terminal, `report.py` writes it as Markdown.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiment
from experiment import ModelConfig, provenance

if TYPE_CHECKING:
    import torch

SCHEMA = 2
DISTRIBUTIONS = (
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
    """Two-view images per second, measured several times."""

    images_per_s: list[float]  # one for each repeat

    @classmethod
    def from_seconds(cls, images: int, seconds: Sequence[float]) -> Rates:
        """The rates at which `images` images were done in each of these times."""
        return cls([images / s for s in seconds])

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def spread(self) -> float:
        """Half the range of the repeats, as a fraction of their median."""
        half_range = (max(self.images_per_s) - min(self.images_per_s)) / 2
        return half_range / self.median


@dataclass(frozen=True)
class StageResult:
    """The throughput of one stage (see `stage_names`)."""

    name: str
    description: str
    rates: Rates  # of rank 0, while all ranks work
    resource: str  # what the stage keeps busy: "cores", "one core", "GPU", "disk" or "bus"
    roofline: float | None = None  # upper bound in images/s, measured in the same run
    roofline_name: str = ""
    ranks: list[Rates] = field(default_factory=list)  # under torchrun: each rank, while all work
    alone: Rates | None = None  # under torchrun: rank 0, while the others wait

    @property
    def total(self) -> float:
        """Images/s of all ranks together."""
        return sum(rates.median for rates in self.ranks or [self.rates])

    @property
    def contention(self) -> float:
        """The fraction of its throughput alone that a rank loses while all ranks work.

        Noise can make it negative.
        """
        if self.alone is None:
            return 0.0
        per_rank = self.total / len(self.ranks)
        return 1 - per_rank / self.alone.median


@dataclass(frozen=True)
class PeerResult:
    """The throughput of a pipeline from encoded images to two finished views, on one core."""

    name: str
    differs: str  # how it differs from the paper's distortions, or "" if it does not
    versions: dict[str, str]
    rates: Rates
    ratio: float  # its rate / the rate of the authors' transform, median over the rounds


@dataclass(frozen=True)
class ConversionRate:
    """The throughput of writing JPEGs to record files."""

    name: str
    against: str  # name of the conversion that it is compared with
    rates: Rates
    ratio: float  # its rate / the rate of that conversion, median over the rounds


@dataclass(frozen=True)
class StepResult:
    """The throughput of a training step, or of the loss and its gradients."""

    name: str
    against: str  # name of the candidate that it is compared with
    precision: str
    batch_size: int
    rates: Rates
    ratio: float | None  # its rate / the other's, median over the rounds; None if that did not fit
    memory_gib: float | None  # peak that it allocates besides the views; None if not measured

    @property
    def ms(self) -> float:
        """Milliseconds per step."""
        return 1000 * self.batch_size / self.rates.median


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    gpu: str | None
    gpu_power_limit_w: float | None
    gpu_driver: str | None
    system: str


@dataclass(frozen=True)
class Data:
    name: str
    images: int  # that were used
    mean_bytes: float
    mean_width: float
    mean_height: float


@dataclass(frozen=True)
class Record:
    """One run of the benchmark."""

    command: str
    commit: str
    versions: dict[str, str]
    machine: Machine
    data: Data
    settings: dict[str, Any]
    stages: list[StageResult] = field(default_factory=list)
    peers: list[PeerResult] = field(default_factory=list)
    conversions: list[ConversionRate] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)
    bounds: dict[str, float] = field(default_factory=dict)  # images/s that each resource allows
    verdict: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        experiment.write_json(path, dataclasses.asdict(self))


def read(path: Path) -> Record:
    """Read a record of schema 1 or 2.

    Raises:
        ValueError: The file is not a record, or has another schema.
    """
    try:
        values = json.loads(path.read_bytes())
        schema = values["schema"]
        if schema == 1:
            return _from_json(_upgraded_from_1(values))
        if schema == SCHEMA:
            return _from_json(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of the benchmark ({error!r})") from None
    raise ValueError(
        f"{path} has schema {schema}, but this program reads 1 and {SCHEMA}: measure again"
    )


def _from_json(values: dict[str, Any]) -> Record:
    typed = {
        "machine": Machine(**values["machine"]),
        "data": Data(**values["data"]),
        "stages": [_stage_from_json(stage) for stage in values["stages"]],
        "peers": [_with_rates(PeerResult, peer) for peer in values["peers"]],
        "conversions": [_with_rates(ConversionRate, one) for one in values["conversions"]],
        "steps": [_with_rates(StepResult, step) for step in values["steps"]],
    }
    return Record(**{**values, **typed})


def _stage_from_json(values: dict[str, Any]) -> StageResult:
    alone = values["alone"]
    typed = {
        "rates": Rates(**values["rates"]),
        "ranks": [Rates(**rates) for rates in values["ranks"]],
        "alone": None if alone is None else Rates(**alone),
    }
    return StageResult(**{**values, **typed})


def _with_rates(result_type: Any, values: dict[str, Any]) -> Any:
    return result_type(**{**values, "rates": Rates(**values["rates"])})


def _upgraded_from_1(values: dict[str, Any]) -> dict[str, Any]:
    """The same record with the keys of schema 2."""
    settings = _renamed(values["settings"], {"turns": "rounds"})
    stage_keys = {
        "what": "description",
        "on": "resource",
        "ceiling": "roofline",
        "ceiling_is": "roofline_name",
    }
    upgraded = {
        **_renamed(values, {"rungs": "stages", "contenders": "peers"}),
        "settings": settings,
        "stages": [_renamed(stage, stage_keys) for stage in values["rungs"]],
        "conversions": [],
        "steps": values.get("steps", []),  # the first records had none
        "schema": 2,
    }
    if "side" in settings:  # a record of `bench convert`, which kept its conversions as peers
        upgraded["conversions"] = [_conversion_from_1(one) for one in values["contenders"]]
        upgraded["peers"] = []
    return upgraded


def _conversion_from_1(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": values["name"],
        "against": values["differs"] or values["name"],
        "rates": values["rates"],
        "ratio": values["ratio"],
    }


def _renamed(values: dict[str, Any], new_names: dict[str, str]) -> dict[str, Any]:
    return {new_names.get(name, name): value for name, value in values.items()}


def versions(distributions: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    """The versions of Python and of those distributions that are installed."""
    libraries = provenance.library_versions(distributions)
    installed = {name: version for name, version in libraries.items() if version is not None}
    return {"python": platform.python_version(), **installed}


def machine(device: torch.device) -> Machine:
    """The machine that the figures are measured on."""
    import pipeline

    settings = provenance.gpu_settings(device) if device.type == "cuda" else None
    return Machine(
        cpu=provenance.cpu_name(),
        cores=pipeline.usable_cores(),
        memory_gib=round(provenance.memory_gib(), 1),
        gpu=pipeline.describe_device(device) if settings else None,
        gpu_power_limit_w=settings.power_limit_w if settings else None,
        gpu_driver=settings.driver if settings else None,
        system=f"{platform.system()} {platform.machine()}",
    )


def commit() -> str:
    """The commit of this checkout, with `-dirty` if tracked files have been changed since."""
    return provenance.git_commit() or "unknown"


def describe_network(config: ModelConfig) -> str:
    """The network in a few words."""
    return f"{config.backbone} of width {config.width}, projector {config.projector}"


def command(arguments: Sequence[str], world_size: int = 1) -> str:
    """The command as it was typed, without the folders in it."""
    program = "python -m bench"
    if world_size > 1:
        program = f"torchrun --nproc-per-node {world_size} -m bench"
    return " ".join([program, *(_without_folders(word) for word in arguments)])


def _without_folders(word: str) -> str:
    """A word of the command line, with the last part of its path if it is one."""
    option, equals, value = "", "", word
    if word.startswith("-"):
        option, equals, value = word.partition("=")
    is_path = "/" in value or value in (".", "..")
    shown = Path(value).resolve().name if is_path else value
    return f"{option}{equals}{shown}"
