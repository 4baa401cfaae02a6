"""twinfeed and other projects' pipelines on one core, from encoded images to two finished views.

All of them get the same images. They are interleaved: each runs once a round, and its ratio to the
authors' transform is taken within the round, so that other load on the machine cancels out.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import NamedTuple

from PIL import Image

from experiment import ProgressBar
from pipeline import (
    FOR_ANY_STORE,
    Loader,
    LoaderOptions,
    MemoryStore,
    Store,
    barlow_twins,
    open_loader,
)

from . import record
from .peers import installed_peers
from .record import PeerResult, Rates
from .resource_bounds import SMALL
from .rooflines import reduced
from .timing import interleave, median_speedup, one_core

IMAGES = 128  # per round
_QUICK_IMAGES = 16
_ROUNDS = 7
_QUICK_ROUNDS = 3
_BATCH_SIZE = 32
_PACKAGES = {"dali": ("nvidia-dali-cuda130",), "cpu": ("simplejpeg", "torch", "numba")}


class Candidate(NamedTuple):
    """A pipeline, over all images."""

    name: str
    packages: tuple[str, ...]  # distributions that determine its speed
    differs: str  # how it differs from the paper's distortions, or ""
    run: Callable[[], object]


def compare(encoded: Sequence[bytes], size: int, quick: bool, bar: ProgressBar) -> list[PeerResult]:
    """Measure every pipeline; the first result is the authors' transform.

    A run of one of our loaders includes its start and its end. Only colour and grey JPEGs are
    used, since not all pipelines can read other images.

    Args:
        encoded: Images that decode.
        size: Side of a view, pixels.
        quick: Whether to measure fewer images and rounds.
        bar: Shows the progress.
    """
    jpegs = [data for data in encoded if _is_ordinary_jpeg(data)]
    jpegs = jpegs[: _QUICK_IMAGES if quick else IMAGES]
    if not jpegs:
        return []
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    with one_core():
        candidates = [*_peer_candidates(jpegs, size), *own_candidates(jpegs, size)]
        seconds = _measure(candidates, rounds, bar)
    reference = seconds[candidates[0].name]
    return [
        PeerResult(
            name=candidate.name,
            differs=candidate.differs,
            versions=record.versions(candidate.packages),
            rates=Rates.from_seconds(len(jpegs), seconds[candidate.name]),
            ratio=median_speedup(reference, seconds[candidate.name]),
        )
        for candidate in candidates
    ]


def _measure(
    candidates: Sequence[Candidate], rounds: int, bar: ProgressBar
) -> dict[str, list[float]]:
    """The seconds of each candidate in each round."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number, candidate in interleave(candidates, rounds, bar):
        began = time.perf_counter()
        candidate.run()
        if number > 0:  # the warm-up compiles, and fills caches
            seconds[candidate.name].append(time.perf_counter() - began)
    return seconds


def _is_ordinary_jpeg(data: bytes) -> bool:
    if data[:2] != b"\xff\xd8":
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.mode in ("RGB", "L")


def _peer_candidates(jpegs: list[bytes], size: int) -> list[Candidate]:
    return [
        Candidate(peer.name, peer.packages, peer.differs, partial(peer.views, jpegs))
        for peer in installed_peers(size)
    ]


def own_candidates(jpegs: list[bytes], size: int) -> list[Candidate]:
    """Our loader with every decoder that is installed, for the images as they are and reduced."""
    differs = f"nothing, but the images are JPEGs of at most {SMALL} px a side"
    whole = MemoryStore(jpegs)
    small = MemoryStore(reduced(jpegs, SMALL))
    candidates = []
    for decoder in FOR_ANY_STORE:
        with suppress(ValueError):  # the decoder is not installed
            packages = _PACKAGES[decoder]
            run_whole = partial(run_epoch, _open_loader(whole, size, decoder))
            run_small = partial(run_epoch, _open_loader(small, size, decoder))
            candidates.append(Candidate(f"twinfeed, {decoder}", packages, "", run_whole))
            name = f"twinfeed, {decoder}, {SMALL} px"
            candidates.append(Candidate(name, packages, differs, run_small))
    return candidates


def _open_loader(store: Store, size: int, decoder: str) -> Loader:
    # Without shuffling every image takes part, even if the last batch is not full.
    options = LoaderOptions(batch_size=_BATCH_SIZE, decoder=decoder, threads=1, shuffle=False)
    return open_loader(store, barlow_twins(size), options)


def run_epoch(loader: Loader) -> None:
    """Make all views of one epoch."""
    with closing(loader.epoch(0)) as batches:
        for _ in batches:
            pass
