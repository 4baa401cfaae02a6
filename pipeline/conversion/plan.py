"""The plan of a conversion: everything that the bytes of its files depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..formats import FORMATS
from ..order import Samples
from ..stores import shuffled
from .options import ConversionOptions
from .source_types import Source


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of a conversion; it is saved as `plan` in `<target>.json`."""

    source: str  # path or URL; "" for images from Python
    identity: str  # see `Source`
    images: int  # in the source
    format: str
    shards: int
    seed: int
    max_side: int | None
    short_side: int | None
    quality: int | None
    validate: bool

    def file_names(self, target: Path) -> list[str]:
        """The names of the files of the result, one for each shard."""
        if not FORMATS[self.format].SHARDED:
            return [target.name]
        of_shards = f"-of-{self.shards:05d}" if self.format == "tfrecord" else ""
        suffix = FORMATS[self.format].SUFFIX
        return [f"shard-{shard:05d}{of_shards}{suffix}" for shard in range(self.shards)]

    def order(self) -> Samples:
        """Which image of the source comes at each position, if none of them is bad."""
        return _order(self.images, self.seed)

    def shard_images(self, shard: int) -> tuple[int, Samples]:
        """The first position of a shard in the data set, and its images' numbers in the source."""
        first = self.images * shard // self.shards
        end = self.images * (shard + 1) // self.shards
        return first, self.order()[first:end]


def make_plan(location: str, source: Source, format: str, options: ConversionOptions) -> Plan:
    """The plan that converts a source, at a path or URL, with these options."""
    images = len(source)
    if FORMATS[format].SHARDED:
        wanted = options.shards or -(-images // options.shard_size)
        shards = max(1, min(wanted, images))
    else:
        shards = 1
    return Plan(
        source=location,
        identity=source.identity,
        images=images,
        format=format,
        shards=shards,
        seed=options.seed,
        max_side=options.max_side,
        short_side=options.short_side,
        quality=options.quality,
        validate=options.validate,
    )


def describe_differences(recorded: Mapping[str, Any], plan: Plan) -> str:
    """How a recorded plan differs from this one, for a message; "" if they are the same.

    The source is compared, too: names alone do not distinguish a data set from its copy with
    images of another size.
    """
    planned = asdict(plan)
    return ", ".join(
        f"{name} {recorded.get(name)} instead of {planned.get(name)}"
        for name in {**planned, **recorded}
        if recorded.get(name) != planned.get(name)
    )


@lru_cache(1)
def _order(images: int, seed: int) -> Samples:
    return shuffled(images, seed)
