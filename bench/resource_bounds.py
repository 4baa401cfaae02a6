"""Which resource limits training, and which change would help most: arithmetic on measured rates.

The model is simple. Each resource (the cores, the GPU, the bus, the disk) does its stages one after
another, so its seconds per image are the sum over those stages, and their inverse is a bound in
images/s. Resources work at the same time, so the lowest bound is the bottleneck. The gain of a
change is the lowest bound with the change, divided by the lowest bound without it.

`bottleneck_report.py` puts this into sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from pipeline.order import BLOCKS_MIXED

from .stage_names import COLD, COPY, DECODE, DISTORT, PLAN, STEP, TWO_CROPS, WARM

CORES = "the cores"
GPU = "the GPU"
BUS = "the copy to the GPU"
DISK = "the disk"

SMALL = 400  # pixels: longest side of the smaller JPEGs that may be proposed
_WINDOW_BYTES = 2**30  # of the blocks that a block-shuffled order mixes


@dataclass(frozen=True)
class StageRates:
    """The rate of each stage alone, and which resources and data it was measured with."""

    rates: Mapping[str, float]  # images/s of each stage
    on_gpu: bool  # whether the GPU distorts and trains
    decodes_on_gpu: bool
    cores: int  # of this rank
    long_side: float  # of the images, mean, pixels
    small_decode_speedup: float | None  # of decoding images of at most SMALL pixels a side
    exceeds_memory: bool  # whether the disk is read in every epoch
    in_record_files: bool
    shuffle_block: int  # contiguous images to read, for `--shuffle-block`


@dataclass(frozen=True)
class Change:
    """A change that could be made."""

    description: str
    gain: float  # lowest bound with it / lowest bound without it
    needs_hardware: bool
    is_upper_bound: bool = False  # the gain assumes that work moved elsewhere takes no time there


def seconds_per_image(measured: StageRates) -> dict[str, dict[str, float]]:
    """The seconds per image of each stage, by resource, the longest first."""
    rates = measured.rates
    cores: dict[str, float] = {}
    gpu: dict[str, float] = {}
    # The plan was measured on one core, the others work meanwhile.
    cores[PLAN] = 1 / rates[PLAN] / measured.cores
    cores[WARM] = 1 / rates[WARM]
    decoding = gpu if measured.decodes_on_gpu else cores
    decoding[TWO_CROPS] = 1 / rates[TWO_CROPS]
    training = gpu if measured.on_gpu else cores
    training[DISTORT] = 1 / rates[DISTORT]
    training[STEP] = 1 / rates[STEP]

    by_resource = {CORES: cores}
    if measured.on_gpu:
        by_resource[GPU] = gpu
    if measured.on_gpu and not measured.decodes_on_gpu:
        by_resource[BUS] = {COPY: 1 / rates[COPY]}
    if measured.exceeds_memory:
        by_resource[DISK] = {COLD: 1 / rates[COLD]}
    return {resource: _longest_first(stages) for resource, stages in by_resource.items()}


def _longest_first(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def bounds(measured: StageRates) -> dict[str, float]:
    """The images/s that each resource allows at most, when it does its stages one after another."""
    return {
        resource: 1 / sum(stages.values())
        for resource, stages in seconds_per_image(measured).items()
    }


def lowest_bound(measured: StageRates) -> float:
    """The images/s that the bottleneck allows."""
    return min(bounds(measured).values())


def bottleneck(measured: StageRates) -> str:
    """The resource with the lowest bound."""
    by_resource = bounds(measured)
    return min(by_resource, key=lambda resource: by_resource[resource])


def without_step(measured: StageRates) -> StageRates:
    """The same, if the training step took no time."""
    return _with_rates(measured, {STEP: inf})


def changes(measured: StageRates) -> list[Change]:
    """The changes that could be made, the most helpful first."""
    possible = [
        _more_cores(measured),
        *_smaller_images(measured),
        *_move_to_gpu(measured),
        *_avoid_disk(measured),
    ]
    return sorted(possible, key=lambda change: -change.gain)


def _more_cores(measured: StageRates) -> Change:
    cores = 2 * measured.cores
    on_cores = seconds_per_image(measured)[CORES]
    # The rate of the plan is that of one core.
    doubled = {stage: 2 * measured.rates[stage] for stage in on_cores if stage != PLAN}
    changed = replace(_with_rates(measured, doubled), cores=cores)
    description = f"{cores} cores instead of {measured.cores}"
    return Change(description, _gain(measured, changed), needs_hardware=True)


def _smaller_images(measured: StageRates) -> list[Change]:
    if measured.small_decode_speedup is None or measured.long_side <= SMALL:
        return []
    rates = measured.rates
    crop_seconds = max(0, 1 / rates[TWO_CROPS] - 1 / rates[DECODE])
    decode_seconds = 1 / (rates[DECODE] * measured.small_decode_speedup)
    changed = _with_rates(measured, {TWO_CROPS: 1 / (decode_seconds + crop_seconds)})
    description = (
        f"JPEGs of at most {SMALL} px a side instead of {measured.long_side:.0f}, "
        f"made by `convert.py DATA TARGET --max-side {SMALL}`"
    )
    return [Change(description, _gain(measured, changed), needs_hardware=False)]


def _move_to_gpu(measured: StageRates) -> list[Change]:
    if not measured.on_gpu:
        changed = _with_rates(measured, {STEP: inf, DISTORT: inf})
        description = "a GPU for the step and the distortions"
        needs_hardware = True
    elif not measured.decodes_on_gpu:
        changed = _with_rates(measured, {TWO_CROPS: inf})
        description = "`--decoder dali`"
        needs_hardware = False
    else:
        return []
    return [Change(description, _gain(measured, changed), needs_hardware, is_upper_bound=True)]


def _avoid_disk(measured: StageRates) -> list[Change]:
    if not measured.exceeds_memory:
        return []
    gain = _gain(measured, replace(measured, exceeds_memory=False))
    hardware = "the data on a faster disk, or enough memory to cache the data"
    blocks = f"`--shuffle-block {measured.shuffle_block}`, which reads long contiguous stretches"
    if not measured.in_record_files:
        blocks = f"`convert.py DATA TARGET`, and then {blocks}"
    return [
        Change(hardware, gain, needs_hardware=True),
        Change(blocks, gain, needs_hardware=False, is_upper_bound=True),
    ]


def _gain(measured: StageRates, changed: StageRates) -> float:
    return lowest_bound(changed) / lowest_bound(measured)


def _with_rates(measured: StageRates, rates: Mapping[str, float]) -> StageRates:
    return replace(measured, rates={**measured.rates, **rates})


def shuffle_block(mean_bytes: float) -> int:
    """Images in a block, to two digits, so that the blocks that are mixed are about 1 GiB."""
    images = _WINDOW_BYTES / BLOCKS_MIXED / mean_bytes
    return max(1, int(float(f"{images:.2g}")))
