"""Records of the benchmark with invented figures."""

from __future__ import annotations

from bench.record import Data, Machine, PeerResult, Rates, Record, StageResult
from bench.resource_bounds import CORES
from bench.stage_names import (
    COLD,
    COPY,
    DECODE,
    DISTORT,
    E2E,
    FEED,
    ONE_CORE,
    PLAN,
    STEP,
    TWO_CROPS,
    WARM,
)

_RESOURCES = {PLAN: "one core", COLD: "disk", COPY: "bus", ONE_CORE: "one core"}
_PEERS = ["authors' transform (Pillow)", "kornia", "twinfeed, cpu, 400 px"]


def make_stage(name: str, position: int, ranks: int = 1) -> StageResult:
    """A stage with the median rate 110 x (position + 1)."""
    factor = position + 1
    rates = Rates([100.0 * factor, 110.0 * factor, 120.0 * factor])
    return StageResult(
        name=name,
        description="the work",
        rates=rates,
        resource=_RESOURCES.get(name, "cores"),
        roofline=2000.0,
        roofline_name="its parts in sequence",
        ranks=[rates] * ranks if ranks > 1 else [],
        alone=Rates([150.0 * factor]) if ranks > 1 else None,
    )


def make_peer(name: str, position: int) -> PeerResult:
    """A peer; the first has no differences, the others have long ones."""
    return PeerResult(
        name=name,
        differs="" if position == 0 else "x" * 90,
        versions={"torch": "2"},
        rates=Rates([10.0 + position, 11.0 + position]),
        ratio=1.0 + position,
    )


def make_record(gpu: bool = False, ranks: int = 1) -> Record:
    """A record of `python -m bench`."""
    before_copy = [PLAN, COLD, WARM, DECODE, TWO_CROPS, DISTORT]
    names = [*before_copy, COPY if gpu else ONE_CORE, FEED, STEP, E2E]
    return Record(
        command="python -m bench --quick",
        commit="0123456789ab",
        versions={"python": "3.12", "torch": "2.15.0"},
        machine=Machine(
            cpu="EPYC",
            cores=2,
            memory_gib=24.0,
            gpu="H100" if gpu else None,
            gpu_power_limit_w=700.0 if gpu else None,
            gpu_driver="580.1" if gpu else None,
            system="Linux x86_64",
        ),
        data=Data("drawn photographs", 128, 95_000.0, 500.0, 375.0),
        settings={
            "size": 224,
            "batch_size": 32,
            "decoder": "cpu",
            "threads": 2,
            "ranks": ranks,
            "network": "resnet18 of width 16",
            "quick": True,
            "cold_read_from_disk": 0.1,
        },
        stages=[make_stage(name, position, ranks) for position, name in enumerate(names)],
        peers=[make_peer(name, position) for position, name in enumerate(_PEERS)],
        bounds={CORES: 67.0},
        verdict=["Step-bound.", "End to end, training reaches 41 images/s."],
    )
