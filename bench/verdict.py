"""What binds, how near to it training comes, and the one change that would help most: from the rates of the rungs."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple

PLAN, COLD, WARM, DECODE, TWO_CROPS = (
    "plan",
    "cold read",
    "warm read",
    "decode",
    "decode, two crops",
)
DISTORT, COPY, FEED, ONE_CORE, STEP, E2E = (
    "distort",
    "copy to the GPU",
    "feed",
    "feed, one core",
    "step",
    "end to end",
)

CORES, GPU, BUS, DISK = "the cores", "the GPU", "the copy to the GPU", "the disk"
SMALL = 400  # pixels: the longest side that images of the proposed size have


class StageRates(NamedTuple):
    """What the rungs came to, each alone, in images/s, and where each of them runs."""

    rates: Mapping[str, float]  # by rung
    on_gpu: bool  # the step and the distortions
    decodes_on_gpu: bool
    cores: int  # of this rank
    long_side: float  # mean, pixels
    smaller_decode: (
        float | None
    )  # decoding images of at most SMALL px a side: how many times as fast
    cold: bool  # the data are larger than the memory: the disk is read in every epoch
    records: bool  # the data are in record files
    block: int  # images to read on end, for `--shuffle-block`


class Change(NamedTuple):
    """Something that could be done, and how many times as many images/s the bounds would then allow."""

    what: str
    gain: float
    bought: bool  # new hardware
    random_subset: bool = False  # as if what is moved elsewhere took no time there


def times(feed: StageRates) -> dict[str, dict[str, float]]:
    """Seconds that each resource spends on an image, by rung, the longest first."""
    r = feed.rates
    cores = {
        PLAN: 1 / r[PLAN] / feed.cores,
        WARM: 1 / r[WARM],
    }  # one core plans while the others work
    gpu: dict[str, float] = {}
    (gpu if feed.decodes_on_gpu else cores)[TWO_CROPS] = 1 / r[TWO_CROPS]
    (gpu if feed.on_gpu else cores).update({DISTORT: 1 / r[DISTORT], STEP: 1 / r[STEP]})
    found = {CORES: cores}
    if feed.on_gpu:
        found[GPU] = gpu
    if feed.on_gpu and not feed.decodes_on_gpu:
        found[BUS] = {COPY: 1 / r[COPY]}
    if feed.cold:
        found[DISK] = {COLD: 1 / r[COLD]}
    return {
        name: dict(sorted(spent.items(), key=lambda item: -item[1]))
        for name, spent in found.items()
    }


def bounds(feed: StageRates) -> dict[str, float]:
    """Images/s that each resource could feed or train at most, by what it does, one after the other."""
    return {name: 1 / sum(spent.values()) for name, spent in times(feed).items()}


def without_step(feed: StageRates) -> StageRates:
    """The same, if training took no time."""
    return feed._replace(rates={**feed.rates, STEP: inf})


def changes(feed: StageRates) -> list[Change]:
    """What could be done, the most helpful first."""
    now = min(bounds(feed).values())
    r = feed.rates

    def gain(**new: object) -> float:
        return min(bounds(feed._replace(**new)).values()) / now  # type: ignore[arg-type]

    faster = {rung: 2 * r[rung] for rung in times(feed)[CORES] if rung != PLAN}
    more = 2 * feed.cores
    found = [
        Change(
            f"{more} cores instead of {feed.cores}", gain(cores=more, rates={**r, **faster}), True
        )
    ]
    if feed.smaller_decode is not None and feed.long_side > SMALL:
        crops = max(0, 1 / r[TWO_CROPS] - 1 / r[DECODE])
        decode = 1 / (1 / (r[DECODE] * feed.smaller_decode) + crops)
        what = (
            f"JPEGs of at most {SMALL} px a side instead of {feed.long_side:.0f} "
            f"(`convert.py DATA TARGET --max-side {SMALL}`)"
        )
        found.append(Change(what, gain(rates={**r, TWO_CROPS: decode}), False))
    if not feed.on_gpu:
        what = "a GPU for the step and the distortions"
        found.append(
            Change(what, gain(rates={**r, STEP: inf, DISTORT: inf}), True, random_subset=True)
        )
    elif not feed.decodes_on_gpu:
        found.append(
            Change("`--decoder dali`", gain(rates={**r, TWO_CROPS: inf}), False, random_subset=True)
        )
    if feed.cold:
        found.append(
            Change("the data on a faster disk, or within the memory", gain(cold=False), True)
        )
        what = f"`--shuffle-block {feed.block}`, which reads records in long stretches"
        what = what if feed.records else f"`convert.py DATA TARGET`, and then {what}"
        found.append(Change(what, gain(cold=False), False, random_subset=True))
    return sorted(found, key=lambda change: -change.gain)


def verdict(feed: StageRates) -> list[str]:
    """The finding in a few sentences."""
    ceilings = bounds(feed)
    binding = min(ceilings, key=lambda name: ceilings[name])
    ceiling = ceilings[binding]
    bound = _bound(feed)
    said = [f"{bound[0].upper()}{bound[1:]} That allows {ceiling:,.0f} images/s."]
    if E2E in feed.rates:
        trained = feed.rates[E2E]
        said.append(
            f"End to end, training reaches {trained:,.0f} images/s: {trained / ceiling:.0%} of it."
        )
        if feed.on_gpu:
            said.append(f"The GPU trains {trained / feed.rates[STEP]:.0%} of the time.")
    for name, rate in ceilings.items():
        if name != binding:
            said.append(
                f"{name[0].upper()}{name[1:]} would allow {rate / ceiling:.1f} times as much."
            )
    said += _advice(changes(feed))
    if binding == CORES and next(iter(times(feed)[CORES])) == STEP:
        feed = without_step(feed)
        said.append(
            f"The feed alone allows {min(bounds(feed).values()):,.0f} images/s and is {_bound(feed)}"
        )
        said += _advice(changes(feed))
    return said


def _bound(feed: StageRates) -> str:
    """What binds, and what takes how much of that resource's time."""
    ceilings = bounds(feed)
    binding = min(ceilings, key=lambda name: ceilings[name])
    spent = times(feed)[binding]
    first, *others = ((name, seconds / sum(spent.values())) for name, seconds in spent.items())
    word = {TWO_CROPS: "decode", COLD: "disk", WARM: "read", COPY: "copy"}.get(first[0], first[0])
    if not others:
        return f"{word}-bound: {binding} is the bottleneck."
    where = f"{feed.cores} core{'s' * (feed.cores > 1)}" if binding == CORES else binding
    rest = ", ".join(f"{_DOING[name]} {share:.0%}" for name, share in others if share >= 0.005)
    rest = f" ({rest})" if rest else ""
    return (
        f"{word}-bound on {where}: {first[1]:.0%} of the time goes into {_DOING[first[0]]}{rest}."
    )


_DOING = {
    PLAN: "planning",
    WARM: "reading",
    TWO_CROPS: "decoding and cropping",
    DISTORT: "distorting",
    STEP: "the training step",
}


def _advice(found: list[Change]) -> list[str]:
    """The change that helps most, and, where it has to be bought, the best of those that have not."""
    best = found[0]
    if best.gain < 1.05:
        return ["Neither more cores nor other data would help."]
    said = [f"What would help most: {_expected(best)}."]
    free = next((change for change in found if not change.bought and change.gain >= 1.05), None)
    if best.bought and free:
        said.append(f"On this machine: {_expected(free)}.")
    return said


def _expected(change: Change) -> str:
    return f"{change.what}, expect {'up to ' * change.random_subset}{change.gain:.1f} times as many images/s"
