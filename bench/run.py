"""`python -m bench`: the ladder, the verdict, the peers, and the record of it all."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import torch

import pipeline
from experiment import Console
from experiment.config import Pretrain
from experiment.presets import PRESETS
from pipeline import Store
from pipeline.formats.record_store import RecordStore
from pipeline.images import BadImage, decode
from pipeline.order import BLOCKS_MIXED

from . import peer_comparison, record, rooflines, tables
from .options import Bench
from .photos import draw_photos
from .record import Rung
from .stages import Ladder, Setting
from .timing import Act, Clock, RankGroup, Work, nothing
from .verdict import (
    COLD,
    COPY,
    DECODE,
    DISTORT,
    E2E,
    FEED,
    ONE_CORE,
    PLAN,
    SMALL,
    STEP,
    TWO_CROPS,
    WARM,
    StageRates,
    bounds,
    verdict,
    without_step,
)

_SAMPLE = 32  # encoded images that the ceilings of decoding are measured with
_MANY_READERS = 32
_QUICK, _FULL = (0.4, 3), (2.0, 5)  # seconds of a repeat, and repeats of a rung
_RUNGS = {
    PLAN: "order, draw, labels: what a batch is made of",
    COLD: "encoded images from the disk, a thread for each core",
    WARM: "the same from the system's memory",
    DECODE: "whole images, from memory",
    TWO_CROPS: "the same, cut and resized twice",
    DISTORT: "crops to finished views",
    COPY: "crops to the device",
    ONE_CORE: "all of that at once from warm files, on one core",
    FEED: "the same on all cores",
    STEP: "training on resident views",
    E2E: "the feed and the step at once: training",
}


def main(config: Bench, console: Console) -> int:
    ranks = RankGroup.started(dict(os.environ))
    result = measure(config, ranks, console)
    tables.record(result, console)
    if config.json and ranks.rank == 0:
        result.write(config.json)
        console.print(f"written to {config.json}")
    return 0


def measure(config: Bench, ranks: RankGroup, console: Console) -> record.Record:
    """Everything that was asked for, measured on all ranks together."""
    device = find_device(config.device, ranks)
    gpu = device.type == "cuda"
    preset: Pretrain = PRESETS[config.preset or ("imagenet-1000e" if gpu else "demo")]()
    threads = config.threads or max(1, pipeline.usable_cores() // ranks.local_world)
    torch.set_num_threads(threads)

    whole = open_images(config, ranks, console)
    store = pipeline.random_subset(config.images, whole)
    if len(store) < max(2, ranks.world):
        raise ValueError(
            f"{len(store)} images are too few to measure with: it takes {max(2, ranks.world)}"
        )
    batch_size = min(config.batch_size or (512 if gpu else 32 if config.quick else 64), len(store))
    setting = Setting(
        store, config.size, batch_size, config.decoder, threads, device, preset.model, preset.optim
    )
    with console.progress(f"reading {len(store):,} images"):
        ladder = Ladder(setting, ranks.rank, ranks.world)
        encoded = ladder.memory.read_batch(np.arange(len(store)))
        mean_bytes = sum(map(len, encoded)) / len(encoded)
        sample = decodable(encoded[:_SAMPLE], store)
        if not sample:
            raise ValueError(
                f"none of the first {_SAMPLE} images decodes, the first: {store.name(0)}"
            )
        known = "bytes" in (whole.index.dtype.names or ())
        size = float(whole.index["bytes"].sum(dtype=np.int64)) if known else mean_bytes * len(whole)
        feed = StageRates(
            rates={},
            on_gpu=gpu,
            decodes_on_gpu=gpu and ladder.loader.decoder.name == "dali",
            cores=threads,
            long_side=float(np.maximum(store.index["width"], store.index["height"]).mean()),
            smaller_decode=smaller_decode(sample),
            cold=size > 0.7 * 2**30 * record.memory_gib(),
            records=isinstance(whole, RecordStore),
            block=shuffle_block(size / len(whole)),
        )
    rungs, feed = climb(ladder, feed, sample, ranks, config.quick, console)
    bad = {store.name(i): reason for i, reason in ladder.loader.bad.items()}
    console.print_rejects("replaced, since it does not decode:", bad)

    contenders = []
    if config.peers and ranks.world == 1:
        with console.progress("the peers, in turns on one core") as bar:
            contenders = peer_comparison.contest(
                decodable(encoded[: peer_comparison.IMAGES], store), config.size, config.quick, bar
            )
    finding = verdict(feed)
    if ranks.world > 1:
        finding[0] = f"Of each of {ranks.world} ranks, all at work: {finding[0]}"
    index = store.index
    return record.Record(
        command=record.command(sys.argv[1:], ranks.world),
        commit=record.commit(),
        versions=record.versions(),
        machine=record.machine(device),
        data=record.Data(
            name="drawn photographs"
            if config.data is None
            else f"images of {config.data.resolve().name}",
            images=len(store),
            mean_bytes=mean_bytes,
            mean_width=float(index["width"].mean()),
            mean_height=float(index["height"].mean()),
        ),
        settings={
            "size": config.size,
            "batch_size": batch_size,
            "decoder": ladder.loader.decoder.name,
            "threads": threads,
            "ranks": ranks.world,
            "network": f"{preset.model.backbone} of width {preset.model.width}, projector {preset.model.projector}",
            "quick": config.quick,
            "cold_read_from_disk": ladder.from_disk(),
        },
        rungs=rungs,
        contenders=contenders,
        bounds=bounds(feed),
        verdict=finding,
    )


def find_device(name: str, ranks: RankGroup) -> torch.device:
    """The device of this rank: under torchrun each has a GPU of its own."""
    if ranks.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return pipeline.find_device(name)


def open_images(config: Bench, ranks: RankGroup, console: Console) -> Store:
    """The user's images, or drawn ones."""
    folder = config.data
    if folder is None:
        count = 128 if config.quick else min(config.images, 512)
        folder = pipeline.cache_folder() / f"photos-{count}"
        with console.progress("drawing photographs, once") as bar:
            if ranks.rank == 0:
                draw_photos(folder, count, progress=bar)
            ranks.meet()
    with console.progress(f"indexing {folder}") as bar:
        store = pipeline.open_store(folder, bar)
    console.print_rejects("left out", store.rejects)
    return store


def climb(
    ladder: Ladder,
    feed: StageRates,
    sample: Sequence[bytes],
    ranks: RankGroup,
    quick: bool,
    console: Console,
) -> tuple[list[Rung], StageRates]:
    """All rungs from the disk upwards, and `feed` with their rates."""
    setting, device, threads = ladder.setting, ladder.device, ladder.setting.threads
    crop_bytes = (
        2 * 3 * setting.size**2
    )  # of both views, as they leave the decoder; finished ones take 4 times as many
    rungs: list[Rung] = []
    rates: dict[str, float] = {}
    feed = feed._replace(rates=rates)
    seconds, repeats = _QUICK if quick else _FULL
    clock = Clock(device, ranks, seconds, repeats)

    def rung(
        name: str,
        work: Work,
        on: str,
        ceiling: float | None,
        ceiling_is: str,
        before: Act = nothing,
    ) -> None:
        first, turns = list(_RUNGS).index(name), repeats * (2 if ranks.world > 1 else 1)
        done = count(first * turns + 1)
        bar(first * turns, len(_RUNGS) * turns, name)
        clock.after_each = lambda: bar(next(done), len(_RUNGS) * turns, name)
        alone = clock.alone(work, before)
        together = clock.together(work, before)
        clock.after_each = nothing
        rates[name] = together[0].median
        every = together if ranks.world > 1 else []
        rungs.append(
            Rung(
                name,
                _RUNGS[name],
                together[0],
                on,
                ceiling,
                ceiling_is if ceiling else "",
                every,
                alone,
            )
        )

    def parts(feed: StageRates) -> float:
        return min(bounds(feed._replace(cold=False)).values())  # the files are warm

    with console.progress("the ladder") as bar:
        chip, decoder = (
            "GPU" if there else "cores" for there in (feed.on_gpu, feed.decodes_on_gpu)
        )
        rung(PLAN, ladder.plan, "one core", None, "")
        many = clock.together(ladder.cold_read(_MANY_READERS), ladder.forget_files)[0]
        fastest = max(many.images_per_s)
        rung(
            COLD,
            ladder.cold_read(threads),
            "disk",
            fastest,
            f"{_MANY_READERS} readers",
            ladder.forget_files,
        )
        copied = rooflines.reading(sum(map(len, sample)) / len(sample), threads)
        rung(WARM, ladder.warm_read, "cores", copied, "copying in memory")
        bare = None if feed.decodes_on_gpu else rooflines.decoding(sample, threads)
        rung(DECODE, ladder.decode, decoder, bare, "bare libjpeg-turbo")
        rung(TWO_CROPS, ladder.crops, decoder, rates[DECODE], "decode")
        written = rooflines.writing(4 * crop_bytes, device, threads)
        rung(DISTORT, ladder.distort, chip, written, "writing the views")
        if feed.on_gpu:
            moved = rooflines.copying(crop_bytes, device)
            rung(COPY, ladder.copy, "bus", moved, "one large copy")
        ceiling, ceiling_is = parts(without_step(feed)), "its parts in turn"
        if threads > 1 and not feed.on_gpu and ranks.world == 1:
            rung(
                ONE_CORE,
                ladder.feed_on_one_core,
                "one core",
                bare and bare / threads,
                "bare libjpeg-turbo",
            )
            ceiling, ceiling_is = threads * rates[ONE_CORE], f"{threads} x one core"
        rung(FEED, ladder.feed, chip, ceiling, ceiling_is)
        multiplied = rooflines.arithmetic(setting.network, setting.size, device)
        rung(STEP, ladder.step, chip, multiplied, "multiplying alone")
        rung(E2E, ladder.end_to_end, chip, parts(feed), "its parts in turn")
    return rungs, feed


def shuffle_block(mean_bytes: float) -> int:
    """Images in a block, to two digits, so that the blocks that are mixed are about 1 GiB."""
    return max(1, int(float(f"{2**30 / BLOCKS_MIXED / mean_bytes:.2g}")))


def decodable(encoded: Sequence[bytes], store: Store) -> list[bytes]:
    """Those of the first images that decode; damaged ones are for the pipeline to find."""

    def sound(data: bytes, row: Any) -> bool:
        with suppress(BadImage):
            decode(data, int(row["height"]), int(row["width"]))
            return True
        return False

    return [data for data, row in zip(encoded, store.index, strict=False) if sound(data, row)]


def smaller_decode(encoded: Sequence[bytes]) -> float | None:
    """How many times as fast images decode at no more than SMALL pixels a side; None where that cannot be said."""
    whole, small = (
        rooflines.decoding(encoded, 1),
        rooflines.decoding(rooflines.smaller(encoded, SMALL), 1),
    )
    return None if whole is None or small is None else small / whole
