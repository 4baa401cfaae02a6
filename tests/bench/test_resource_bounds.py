"""Bounds and gains, against sums by hand, and the sentences of the verdict about them."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from bench.bottleneck_report import verdict
from bench.resource_bounds import (
    BUS,
    CORES,
    DISK,
    GPU,
    StageRates,
    bounds,
    changes,
    seconds_per_image,
    shuffle_block,
    without_step,
)
from bench.stage_names import COLD, COPY, DECODE, DISTORT, E2E, PLAN, STEP, TWO_CROPS, WARM
from pipeline.order import BLOCKS_MIXED

RATES = {
    PLAN: 10_000.0,
    COLD: 300.0,
    WARM: 4000.0,
    DECODE: 800.0,
    TWO_CROPS: 500.0,
    DISTORT: 1000.0,
    STEP: 2000.0,
    COPY: 5000.0,
}
# Milliseconds of an image on four cores: plan 0.025, read 0.25, decode 2, distort 1, step 0.5.
PLAN_MS, WARM_MS, DECODE_MS, DISTORT_MS, STEP_MS = 0.025, 0.25, 2.0, 1.0, 0.5
ALL_MS = PLAN_MS + WARM_MS + DECODE_MS + DISTORT_MS + STEP_MS  # 3.775
FEED_MS = ALL_MS - STEP_MS
# Of the 2 ms, 1.25 are decoding, which JPEGs of half the area halve, and 0.75 cropping.
SMALL_JPEGS_SAVE_MS = 1.25 / 2


def measured(
    rates: dict[str, float] | None = None,
    *,
    on_gpu: bool = False,
    decodes_on_gpu: bool = False,
    exceeds_memory: bool = False,
    in_record_files: bool = False,
) -> StageRates:
    """Four cores, and images of 500 pixels that decode in half the time if they have 400."""
    return StageRates(
        rates={**RATES, **(rates or {})},
        on_gpu=on_gpu,
        decodes_on_gpu=decodes_on_gpu,
        cores=4,
        long_side=500.0,
        small_decode_speedup=2.0,
        exceeds_memory=exceeds_memory,
        in_record_files=in_record_files,
        shuffle_block=610,
    )


MORE_CORES = "8 cores instead of 4"
SMALL_JPEGS = (
    "JPEGs of at most 400 px a side instead of 500, made by `convert.py DATA TARGET --max-side 400`"
)
A_GPU = "a GPU for the step and the distortions"
DALI = "`--decoder dali`"
FASTER_DISK = "the data on a faster disk, or enough memory to cache the data"
BLOCKS = "`--shuffle-block 610`, which reads long contiguous stretches"


def gains(rates: StageRates) -> dict[str, float]:
    return {change.description: change.gain for change in changes(rates)}


# A CPU alone


def test_the_cores_do_one_stage_after_another() -> None:
    rates = measured({E2E: 200})
    assert bounds(rates) == {CORES: pytest.approx(1000 / ALL_MS)}
    expected = {TWO_CROPS: 2e-3, DISTORT: 1e-3, STEP: 0.5e-3, WARM: 0.25e-3, PLAN: 0.025e-3}
    assert seconds_per_image(rates) == {CORES: pytest.approx(expected)}
    assert list(seconds_per_image(rates)[CORES]) == list(expected)
    assert bounds(without_step(rates)) == {CORES: pytest.approx(1000 / FEED_MS)}


def test_the_verdict_names_the_bottleneck_and_what_training_reaches() -> None:
    sentences = verdict(measured({E2E: 200}))
    assert sentences[0] == (
        "Limited by decoding and cropping: 53% of the time on 4 cores "
        "(distorting 26%, the training step 13%, reading 7%, planning 1%). "
        "That allows 265 images/s."
    )
    assert sentences[1] == "End to end, training reaches 200 images/s: 75% of that."


def test_gains_of_all_changes_on_a_cpu() -> None:
    assert gains(measured()) == {
        MORE_CORES: pytest.approx(2),
        A_GPU: pytest.approx(ALL_MS / (ALL_MS - DISTORT_MS - STEP_MS)),
        SMALL_JPEGS: pytest.approx(ALL_MS / (ALL_MS - SMALL_JPEGS_SAVE_MS)),
    }
    assert verdict(measured())[-2:] == [
        f"To speed up training: {MORE_CORES} (expected: 2.0 times as many images/s).",
        f"On this machine: {SMALL_JPEGS} (expected: 1.2 times as many images/s).",
    ]


def test_smaller_jpegs_are_proposed_only_for_large_jpegs() -> None:
    assert gains(replace(measured(), long_side=400.0)).keys() == {MORE_CORES, A_GPU}
    assert gains(replace(measured(), small_decode_speedup=None)).keys() == {MORE_CORES, A_GPU}


def test_if_the_step_limits_a_cpu_the_feed_without_it_is_judged_too() -> None:
    sentences = verdict(measured({STEP: 100}))  # 10 ms, 13.275 in all
    assert sentences[0].startswith("Limited by the training step: 75% of the time on 4 cores")
    assert sentences[1] == (
        f"To speed up training: {A_GPU} (expected: up to 5.8 times as many images/s)."
    )
    assert sentences[2].startswith(
        "The feed alone allows 305 images/s, limited by decoding and cropping: 61% of the time"
    )
    assert sentences[3].startswith("To speed up the feed: 8 cores instead of 4 (expected: 2.0")


def test_without_the_step_its_rate_does_not_matter() -> None:
    slow = without_step(measured({STEP: 1}))
    assert bounds(slow)[CORES] == bounds(measured({STEP: inf}))[CORES]


# A GPU


def test_a_gpu_that_the_cores_cannot_feed() -> None:
    cores_ms = PLAN_MS + WARM_MS + DECODE_MS
    gpu_ms = DISTORT_MS + STEP_MS
    rates = measured({E2E: 400}, on_gpu=True)
    assert bounds(rates) == pytest.approx({CORES: 1000 / cores_ms, GPU: 1000 / gpu_ms, BUS: 5000})
    sentences = verdict(rates)
    assert sentences[0].startswith("Limited by decoding and cropping: 88% of the time on 4 cores")
    assert "That allows 440 images/s." in sentences[0]
    assert sentences[1:5] == [
        "End to end, training reaches 400 images/s: 91% of that.",
        "The GPU trains 20% of the time.",
        "The GPU could deliver 1.5 times as many images/s.",
        "The copy to the GPU could deliver 11.4 times as many images/s.",
    ]
    # More cores and DALI gain until the GPU is the bottleneck.
    assert gains(rates) == pytest.approx(
        {
            MORE_CORES: cores_ms / gpu_ms,
            SMALL_JPEGS: cores_ms / (cores_ms - SMALL_JPEGS_SAVE_MS),
            DALI: cores_ms / gpu_ms,
        }
    )


def test_decoding_on_the_gpu_relieves_the_cores_and_the_bus() -> None:
    gpu_ms = DECODE_MS + DISTORT_MS + STEP_MS
    rates = measured(on_gpu=True, decodes_on_gpu=True)
    assert bounds(rates) == pytest.approx({CORES: 1000 / (PLAN_MS + WARM_MS), GPU: 1000 / gpu_ms})
    assert verdict(rates)[0].startswith(
        "Limited by decoding and cropping: 57% of the time on the GPU"
    )
    smaller = gpu_ms / (gpu_ms - SMALL_JPEGS_SAVE_MS)
    assert gains(rates) == pytest.approx({MORE_CORES: 1.0, SMALL_JPEGS: smaller})
    assert SMALL_JPEGS in verdict(rates)[-1]


def test_nothing_helps_a_gpu_that_only_trains() -> None:
    sentences = verdict(measured({STEP: 50}, on_gpu=True))
    assert sentences[0].startswith("Limited by the training step: 95% of the time on the GPU")
    assert sentences[-1] == "Neither more cores nor other data would help."


def test_the_bus_can_be_the_bottleneck() -> None:
    sentences = verdict(measured({COPY: 100}, on_gpu=True))
    assert sentences[0] == ("Limited by the copy to the GPU. That allows 100 images/s.")


# Disks and blocks


def test_the_disk_can_be_the_bottleneck() -> None:
    rates = measured(on_gpu=True, exceeds_memory=True)
    sentences = verdict(rates)
    assert sentences[0] == "Limited by the disk. That allows 300 images/s."
    assert gains(rates)[FASTER_DISK] == pytest.approx(440 / 300, rel=0.01)
    assert f"{FASTER_DISK} (expected: 1.5 times" in sentences[-2]
    assert DISK not in bounds(replace(rates, exceeds_memory=False))


def test_records_larger_than_the_memory_are_to_be_shuffled_in_blocks() -> None:
    expectation = "(expected: up to 1.5 times as many images/s)."
    records = measured(on_gpu=True, exceeds_memory=True, in_record_files=True)
    assert verdict(records)[-1] == f"On this machine: {BLOCKS} {expectation}"
    folder = replace(records, in_record_files=False)
    convert = "`convert.py DATA TARGET`, and then "
    assert verdict(folder)[-1] == f"On this machine: {convert}{BLOCKS} {expectation}"


def test_blocks_are_not_proposed_if_the_disk_is_not_the_bottleneck() -> None:
    in_memory = measured(on_gpu=True, in_record_files=True)
    fast_disk = measured({COLD: 1e5}, on_gpu=True, exceeds_memory=True, in_record_files=True)
    for rates in (in_memory, fast_disk):
        assert "--shuffle-block" not in " ".join(verdict(rates))


@pytest.mark.parametrize("mean_bytes", [110_000, 3_000, 987_654])
def test_the_blocks_that_are_mixed_are_about_a_gibibyte(mean_bytes: int) -> None:
    block = shuffle_block(mean_bytes)
    assert BLOCKS_MIXED == 16
    assert 16 * block * mean_bytes == pytest.approx(2**30, rel=0.05)
    assert len(str(block).rstrip("0")) <= 2


def test_a_block_has_at_least_one_image() -> None:
    assert shuffle_block(1e9) == 1


def test_the_change_that_is_named_gains_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        random_rates = {stage: float(10 ** rng.uniform(1, 5)) for stage in RATES}
        random_rates[E2E] = 10.0
        random_rates[DECODE] = 2 * random_rates[TWO_CROPS]
        rates = measured(
            random_rates,
            on_gpu=bool(rng.integers(2)),
            decodes_on_gpu=bool(rng.integers(2)),
            exceeds_memory=bool(rng.integers(2)),
            in_record_files=bool(rng.integers(2)),
        )
        sentences = verdict(rates)
        named = [one for one in sentences if one.startswith("To speed up training")]
        best = max(change.gain for change in changes(rates))
        judges_feed = "The feed alone" in " ".join(sentences)
        assert bool(named) == (best >= 1.05) or judges_feed
        if best >= 1.05:
            expected = re.search(r"expected: (?:up to )?([\d.]+) times", named[0])
            assert expected
            assert float(expected[1]) == pytest.approx(best, abs=0.051)
