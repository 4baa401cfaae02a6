"""twinfeed and the others on one core, in turns, from the same encoded images to two finished views."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiment import ProgressBar
from pipeline import FOR_ANY_STORE, Loader, LoaderOptions, barlow_twins, open_loader
from pipeline.images import image_size

from . import record, rooflines
from .peers import peers
from .record import Contender, Rates
from .stages import InMemory
from .timing import one_core
from .verdict import SMALL

IMAGES = 128  # of a turn


class Entrant(NamedTuple):
    name: str
    packages: tuple[str, ...]
    differs: str
    run: Callable[[], object]


def contest(encoded: Sequence[bytes], size: int, quick: bool, bar: ProgressBar) -> list[Contender]:
    """Every contender over the same images, turn by turn; the authors' transform is the first.

    A turn of a loader is one run of it over all of them, its beginning and end included. Only what all can read takes
    part: JPEGs in colour or grey.
    """
    turns, count = (3, 16) if quick else (7, IMAGES)
    encoded = [data for data in encoded if _ordinary(data)][:count]
    if not encoded:
        return []
    with one_core():
        entrants = _entrants(encoded, size)
        seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
        for turn in range(turns + 1):  # the first warms up: it builds, compiles and fills caches
            for i, entrant in enumerate(entrants):
                bar(turn * len(entrants) + i, (turns + 1) * len(entrants), entrant.name)
                began = time.perf_counter()
                entrant.run()
                if turn:
                    seconds[entrant.name].append(time.perf_counter() - began)
    reference = seconds[entrants[0].name]
    return [
        Contender(
            entrant.name,
            entrant.differs,
            record.versions(entrant.packages),
            Rates([len(encoded) / s for s in seconds[entrant.name]]),
            statistics.median(
                theirs / ours for theirs, ours in zip(reference, seconds[entrant.name], strict=True)
            ),
        )
        for entrant in entrants
    ]


def _ordinary(data: bytes) -> bool:
    if data[:2] != b"\xff\xd8":
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.mode in ("RGB", "L")


def _entrants(encoded: list[bytes], size: int) -> list[Entrant]:
    found = [
        Entrant(peer.name, peer.packages, peer.differs, partial(peer.views, encoded))
        for peer in peers(size)
    ]
    small = f"nothing, but the images are JPEGs of at most {SMALL} px a side"
    stores = (
        ("", "", _store(encoded)),
        (f", {SMALL} px", small, _store(rooflines.smaller(encoded, SMALL))),
    )
    for decoder, (suffix, differs, store) in product(FOR_ANY_STORE, stores):
        packages = (
            ("nvidia-dali-cuda130",) if decoder == "dali" else ("simplejpeg", "torch", "numba")
        )
        with suppress(ValueError):  # not installed
            loader = (
                open_loader(  # in order: every image takes part, however many make the last batch
                    store,
                    barlow_twins(size),
                    LoaderOptions(batch_size=32, decoder=decoder, threads=1, shuffle=False),
                )
            )
            found.append(
                Entrant(f"twinfeed, {decoder}{suffix}", packages, differs, partial(_run, loader))
            )
    return found


def _store(encoded: Sequence[bytes]) -> InMemory:
    rows = [(-1, *image_size(data)) for data in encoded]
    return InMemory(
        encoded, np.array(rows, dtype=[("label", "i8"), ("height", "i8"), ("width", "i8")])
    )


def _run(loader: Loader) -> None:
    with closing(loader.epoch(0)) as batches:
        for _ in batches:
            pass
