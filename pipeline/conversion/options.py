"""The options of a conversion, spelled once for `write_store` and everything below it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConversionOptions:
    """How a data set is converted.

    Raises:
        ValueError: For a value outside its range.
    """

    format: str | None = None
    """One of FORMATS. None: the one that the suffix of the target names."""
    shards: int | None = None
    """Number of files. None: as many as hold `shard_size` images each."""
    shard_size: int = 5000
    """Images per shard, if `shards` is None."""
    max_side: int | None = None
    """Images with a longer side of more pixels than this are resized and re-encoded."""
    short_side: int | None = None
    """Images with a shorter side of more pixels than this are resized and re-encoded."""
    quality: int | None = None
    """JPEG quality, 1 to 100, of the images that are re-encoded; JPEGs of a higher quality are
    re-encoded, too. None: 96, and quality alone is no reason to re-encode."""
    seed: int = 0
    """Decides the order of the images."""
    validate: bool = True
    """Whether to check the compressed data of each image. False: images that pass through are only
    identified by their headers."""
    strict: bool = False
    """Whether the first bad image raises ValueError. False: bad images are left out."""
    threads: int | None = None
    """Threads that read, decode and encode. None: one per core that this process may use."""

    def __post_init__(self) -> None:
        _check_range("--shards", self.shards, 1, 99_999)
        _check_range("--shard-size", self.shard_size, 1)
        _check_range("--max-side", self.max_side, 1)
        _check_range("--short-side", self.short_side, 1)
        _check_range("--quality", self.quality, 1, 100)
        _check_range("--threads", self.threads, 1)


def _check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is None:
        return
    if value < least or (most is not None and value > most):
        at_most = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} is {value}: it must be at least {least}{at_most}")
