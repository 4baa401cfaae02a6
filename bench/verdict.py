"""What binds, how near to it training comes, and the one change that would help most: from the rates of the rungs."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple

DECODE = "decode, two crops"
E2E = "end to end"


class Feed(NamedTuple):
    """What the rungs came to, each alone, in images/s, and where each of them runs."""

    rates: Mapping[str, float]  # by rung; `copy` where there is a GPU
    on_gpu: bool  # the step and the distortions
    decodes_on_gpu: bool
    cores: int
    long_side: float  # mean, pixels
    smaller_decode: float | None  # decoding images of at most 400 px a side: how many times as fast
    cold: bool  # the data are larger than the memory: the disk is read in every epoch


def bounds(feed: Feed) -> dict[str, float]:
    """Images/s that each resource could feed or train at most, by what it does."""
    r = feed.rates
    on_cores = [r["plan"], r["read, warm"], *(() if feed.decodes_on_gpu else (r[DECODE],))]
    on_gpu = [r["distort"], r["step"], *((r[DECODE],) if feed.decodes_on_gpu else ())]
    if not feed.on_gpu:
        found = {"the cores": _one_after_the_other(*on_cores, *on_gpu)}
    else:
        found = {"the cores": _one_after_the_other(*on_cores), "the GPU": _one_after_the_other(*on_gpu)}
        found["the copy to the GPU"] = r["copy to the GPU"]
    if feed.cold:
        found["the disk"] = r["read, cold"]
    return found


def shares(feed: Feed) -> dict[str, float]:
    """What each rung takes of the time of the resource that binds, largest first."""
    r, binding = feed.rates, _binding(feed)
    if binding in ("the disk", "the copy to the GPU"):
        return {"read, cold" if binding == "the disk" else "copy to the GPU": 1.0}
    gpu = {"distort", "step", *({DECODE} if feed.decodes_on_gpu else ())}
    cores = {"plan", "read, warm", "distort", "step", DECODE} - (gpu if feed.on_gpu else set())
    times = {name: 1 / r[name] for name in (gpu if binding == "the GPU" else cores)}
    return {name: t / sum(times.values()) for name, t in sorted(times.items(), key=lambda item: -item[1])}


def changes(feed: Feed) -> dict[str, float]:
    """What could be changed, and how many times as fast the bounds would then be."""
    now = min(bounds(feed).values())
    r = feed.rates

    def gain(**new: object) -> float:
        return min(bounds(feed._replace(**new)).values()) / now  # type: ignore[arg-type]

    found = {}
    if feed.smaller_decode is not None and feed.long_side > 400:
        rest = 1 / r[DECODE] - 1 / r["decode"]  # cropping
        faster = 1 / (1 / (r["decode"] * feed.smaller_decode) + max(0, rest))
        found["JPEGs of at most 400 px a side"] = gain(rates={**r, DECODE: faster})
    on_cores = ["plan", "read, warm", *(() if feed.decodes_on_gpu else (DECODE,))]
    on_cores += () if feed.on_gpu else ("distort", "step")
    found[f"{2 * feed.cores} cores instead of {feed.cores}"] = gain(
        rates={**r, **{name: 2 * r[name] for name in on_cores if name != "plan"}}
    )
    if not feed.on_gpu:
        found["a GPU for the step and the distortions"] = gain(rates={**r, "step": 1e9, "distort": 1e9})
    if feed.cold:
        found["the data on a faster disk, or within the memory"] = gain(cold=False)
    return found


def verdict(feed: Feed) -> list[str]:
    """The finding in a few sentences."""
    bound_by, share = bounds(feed), shares(feed)
    binding, ceiling = _binding(feed), min(bounds(feed).values())
    first = next(iter(share))
    parts = ", ".join(f"{name} {part:.0%}" for name, part in share.items() if part >= 0.005)
    said = [f"{_bound_name(first)}-bound: {binding} can do {ceiling:,.0f} images/s; of that time {parts}."]
    if E2E in feed.rates:
        reached = feed.rates[E2E] / ceiling
        said.append(f"End to end, training reaches {feed.rates[E2E]:,.0f} images/s: {reached:.0%} of that.")
        if feed.on_gpu:
            said.append(f"The GPU trains {feed.rates[E2E] / feed.rates['step']:.0%} of the time.")
    slack = {name: rate / ceiling for name, rate in bound_by.items() if name != binding}
    said += [f"{name[0].upper()}{name[1:]} could do {ratio:.1f} times as much." for name, ratio in slack.items()]
    change, gain = max(changes(feed).items(), key=lambda item: item[1])
    if gain < 1.05:
        said.append("Nothing about the feed would help: the step is all that is left.")
    else:
        said.append(f"What would help most: {change}; expect {gain:.1f} times as many images/s.")
    if first == "step" and not feed.on_gpu:
        alone = feed._replace(rates={**{name: rate for name, rate in feed.rates.items() if name != E2E}, "step": inf})
        said += [f"The feed alone: {sentence}" for sentence in verdict(alone)]
    return said


def _binding(feed: Feed) -> str:
    found = bounds(feed)
    return min(found, key=lambda name: found[name])


def _bound_name(rung: str) -> str:
    return {DECODE: "decode", "read, cold": "disk", "read, warm": "read", "copy to the GPU": "copy"}.get(rung, rung)


def _one_after_the_other(*rates: float) -> float:
    return 1 / sum(1 / rate for rate in rates)
