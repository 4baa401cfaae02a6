"""What the bench concludes, against sums done by hand."""

from __future__ import annotations

import re
from math import inf

import numpy as np
import pytest

from bench.run import shuffle_block
from bench.verdict import (
    BUS,
    COLD,
    COPY,
    CORES,
    DECODE,
    DISK,
    DISTORT,
    E2E,
    GPU,
    PLAN,
    STEP,
    TWO_CROPS,
    WARM,
    StageRates,
    bounds,
    changes,
    times,
    verdict,
    without_step,
)

RATES = {
    PLAN: 10_000,
    COLD: 300,
    WARM: 4000,
    DECODE: 800,
    TWO_CROPS: 500,
    DISTORT: 1000,
    STEP: 2000,
    COPY: 5000,
}
#  ms an image on four cores: 0.025 + 0.25 + 2 + 1 + 0.5 = 3.775


def feed(
    on_gpu: bool = False,
    decodes_on_gpu: bool = False,
    cold: bool = False,
    records: bool = False,
    **rates: float,
) -> StageRates:
    """Four cores and images of 500 pixels that decode in half the time when they have 400."""
    of = {"decode_crops": TWO_CROPS, "end": E2E}
    named = {of.get(name, name): rate for name, rate in rates.items()}
    return StageRates(RATES | named, on_gpu, decodes_on_gpu, 4, 500.0, 2.0, cold, records, 610)


def gains(feed: StageRates) -> dict[str, float]:
    return {change.what.split()[0]: change.gain for change in changes(feed)}


def test_on_a_cpu_the_cores_do_one_thing_after_the_other() -> None:
    found = feed(end=200)
    assert bounds(found) == {CORES: pytest.approx(1000 / 3.775)}
    spent = {TWO_CROPS: 2e-3, DISTORT: 1e-3, STEP: 0.5e-3, WARM: 0.25e-3, PLAN: 0.025e-3}
    assert times(found) == {CORES: pytest.approx(spent)}
    assert list(times(found)[CORES]) == list(spent)
    said = verdict(found)
    assert said[0] == (
        "Decode-bound on 4 cores: 53% of the time goes into decoding and cropping "
        "(distorting 26%, the training step 13%, reading 7%, planning 1%). That allows 265 images/s."
    )
    assert said[1] == "End to end, training reaches 200 images/s: 75% of it."
    assert bounds(without_step(found)) == {CORES: pytest.approx(1000 / 3.275)}


def test_the_gains_of_all_changes_on_a_cpu() -> None:
    """Smaller JPEGs halve the 1.25 ms of decoding and leave the 0.75 ms of cropping; a GPU takes 1.5 ms away."""
    assert gains(feed()) == {
        "8": pytest.approx(2),
        "a": pytest.approx(3.775 / 2.275),
        "JPEGs": pytest.approx(3.775 / (3.775 - 0.625)),
    }
    assert verdict(feed())[-2:] == [
        "What would help most: 8 cores instead of 4, expect 2.0 times as many images/s.",
        "On this machine: JPEGs of at most 400 px a side instead of 500 (`convert.py DATA TARGET --max-side 400`), "
        "expect 1.2 times as many images/s.",
    ]
    assert gains(feed()._replace(long_side=400.0)).keys() == {"8", "a"}
    assert gains(feed()._replace(smaller_decode=None)).keys() == {"8", "a"}


def test_a_step_that_binds_on_a_cpu_is_said_and_so_is_what_binds_the_feed_without_it() -> None:
    found = feed(step=100)  # 10 ms: 13.275 in all
    said = verdict(found)
    assert said[0].startswith("Step-bound on 4 cores: 75% of the time goes into the training step")
    assert said[1] == (
        "What would help most: a GPU for the step and the distortions, expect up to 5.8 times as many images/s."
    )
    assert said[2].startswith(
        "The feed alone allows 305 images/s and is decode-bound on 4 cores: 61% of the time"
    )
    assert "8 cores instead of 4, expect 2.0" in said[3]


def test_a_gpu_that_the_cores_cannot_feed() -> None:
    """Reading, planning and decoding 2.275 ms on the cores; distorting and training 1.5 ms on the GPU."""
    found = feed(on_gpu=True, end=400)
    assert bounds(found) == pytest.approx({CORES: 1000 / 2.275, GPU: 1000 / 1.5, BUS: 5000})
    said = verdict(found)
    assert said[0].startswith("Decode-bound on 4 cores: 88% of the time goes into decoding")
    assert "That allows 440 images/s." in said[0]
    assert said[1:5] == [
        "End to end, training reaches 400 images/s: 91% of it.",
        "The GPU trains 20% of the time.",
        "The GPU would allow 1.5 times as much.",
        "The copy to the GPU would allow 11.4 times as much.",
    ]
    assert gains(found) == pytest.approx(
        {"8": 2.275 / 1.5, "JPEGs": 2.275 / (2.275 - 0.625), "`--decoder": 2.275 / 1.5}
    )  # from 1.5 ms on the GPU binds


def test_decoding_on_the_gpu_leaves_the_cores_and_the_bus_alone() -> None:
    found = feed(on_gpu=True, decodes_on_gpu=True)
    assert bounds(found) == pytest.approx({CORES: 1000 / 0.275, GPU: 1000 / 3.5})
    assert verdict(found)[0].startswith(
        "Decode-bound on the GPU: 57% of the time goes into decoding and cropping"
    )
    assert gains(found) == pytest.approx({"8": 1.0, "JPEGs": 3.5 / (3.5 - 0.625)})
    assert "JPEGs of at most 400 px a side" in verdict(found)[-1]


def test_a_gpu_that_only_trains_has_nothing_to_gain_from_its_feed() -> None:
    found = feed(on_gpu=True, step=50)
    assert verdict(found)[0].startswith("Step-bound on the GPU: 95%")
    assert verdict(found)[-1] == "Neither more cores nor other data would help."


@pytest.mark.parametrize(
    ("found", "first", "gain"),
    [
        (
            feed(on_gpu=True, **{COPY: 100}),
            "Copy-bound: the copy to the GPU is the bottleneck. That allows 100",
            None,
        ),
        (
            feed(on_gpu=True, cold=True),
            "Disk-bound: the disk is the bottleneck. That allows 300 images/s.",
            440 / 300,
        ),
    ],
)
def test_the_bus_and_the_disk_can_bind_too(
    found: StageRates, first: str, gain: float | None
) -> None:
    said = verdict(found)
    assert said[0].startswith(first)
    if gain:
        assert gains(found)["the"] == pytest.approx(gain, rel=0.01)
        assert "the data on a faster disk, or within the memory, expect 1.5 times" in said[-2]
    assert DISK not in bounds(found._replace(cold=False))


def test_data_larger_than_the_memory_are_to_be_read_in_blocks() -> None:
    """A record file as it is, a folder once it is one."""
    blocks = "`--shuffle-block 610`, which reads records in long stretches, expect up to 1.5 times as many images/s."
    assert verdict(feed(on_gpu=True, cold=True, records=True))[-1] == f"On this machine: {blocks}"
    convert = "`convert.py DATA TARGET`, and then "
    assert verdict(feed(on_gpu=True, cold=True))[-1] == f"On this machine: {convert}{blocks}"
    for without in (
        feed(on_gpu=True, records=True),
        feed(on_gpu=True, cold=True, records=True, **{COLD: 1e5}),
    ):
        assert "--shuffle-block" not in " ".join(verdict(without)), "the disk does not bind"


def test_the_blocks_that_are_mixed_are_a_gibibyte() -> None:
    for mean_bytes in (110_000, 3_000, 987_654):
        block = shuffle_block(mean_bytes)
        assert 16 * block * mean_bytes == pytest.approx(2**30, rel=0.05)
        assert len(str(block).rstrip("0")) <= 2
    assert shuffle_block(1e9) == 1


def test_the_change_that_is_named_is_the_one_that_gains_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rates = {name: float(10 ** rng.uniform(1, 5)) for name in RATES} | {E2E: 10.0}
        rates[DECODE] = 2 * rates[TWO_CROPS]
        found = StageRates(
            rates,
            *map(bool, rng.integers(0, 2, 2)),
            4,
            500.0,
            2.0,
            *map(bool, rng.integers(0, 2, 2)),
            610,
        )
        named = [s for s in verdict(found) if s.startswith("What would help most")]
        best = max(change.gain for change in changes(found))
        assert bool(named) == (best >= 1.05) or "The feed alone" in " ".join(verdict(found))
        if best >= 1.05:
            said = re.search(r"expect (?:up to )?([\d.]+) times", named[0])
            assert said
            assert float(said[1]) == pytest.approx(best, abs=0.051)


def test_the_feed_that_is_judged_trains_without_the_step_at_infinity() -> None:
    assert bounds(without_step(feed(step=1)))[CORES] == bounds(feed(step=inf))[CORES]
