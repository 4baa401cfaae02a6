"""twinfeed and the others on one core, in turns, from the same encoded images to two finished views."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice, product
from typing import NamedTuple

import numpy as np

from pipeline import DECODERS, Loader, Store, barlow_twins, open_loader
from pipeline.images import image_size
from runlog import Bar

from . import ceilings, record
from .ladder import InMemory
from .measure import one_core
from .peers import peers
from .record import Contender, Rates

_SMALL = 400  # pixels: the longest side of the smaller JPEGs


class Entrant(NamedTuple):
    name: str
    packages: tuple[str, ...]
    differs: str
    run: Callable[[], object]


def contest(store: Store, size: int, quick: bool, bar: Bar) -> list[Contender]:
    """Every contender over the same images of `store`, turn by turn; the authors' transform is the first.

    A turn of a loader is one run of it over all of them, its beginning and end included.
    """
    turns, count = (3, 16) if quick else (7, 128)
    jpegs = (data for data in store.read_batch(np.arange(len(store))) if data[:2] == b"\xff\xd8")
    encoded = list(islice(jpegs, count))  # the only format that all of them read
    if len(encoded) < 2:
        return []
    with one_core():
        runs = _contenders(encoded, size)
        seconds: dict[str, list[float]] = {entrant.name: [] for entrant in runs}
        for turn in range(turns + 1):  # the first warms up: it builds, compiles and fills caches
            for i, (name, _, _, run) in enumerate(runs):
                bar(turn * len(runs) + i, (turns + 1) * len(runs), name)
                began = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    reference = next(iter(seconds.values()))
    return [
        Contender(
            name,
            differs,
            record.versions(packages),
            Rates([len(encoded) / s for s in seconds[name]]),
            statistics.median(theirs / ours for theirs, ours in zip(reference, seconds[name], strict=True)),
        )
        for name, packages, differs, _ in runs
    ]


def _contenders(encoded: list[bytes], size: int) -> list[Entrant]:
    found = [Entrant(peer.name, peer.packages, peer.differs, partial(peer.views, encoded)) for peer in peers(size)]
    stores = {"": _store(encoded), f", JPEGs of at most {_SMALL} px": _store(ceilings.smaller(encoded, _SMALL))}
    for decoder, (what, store) in product(DECODERS, stores.items()):
        packages = ("nvidia-dali-cuda130",) if decoder == "dali" else ("simplejpeg", "torch", "numba")
        with suppress(ValueError):  # not installed
            loader = open_loader(store, barlow_twins(size), batch_size=min(32, len(store)), decoder=decoder, threads=1)
            found.append(Entrant(f"twinfeed, {decoder}{what}", packages, "", partial(_run, loader)))
    return found


def _store(encoded: Sequence[bytes]) -> InMemory:
    rows = [(-1, *image_size(data)) for data in encoded]
    return InMemory(encoded, np.array(rows, dtype=[("label", "i8"), ("height", "i8"), ("width", "i8")]))


def _run(loader: Loader) -> None:
    with closing(loader.epoch(0)) as batches:
        for _ in batches:
            pass
