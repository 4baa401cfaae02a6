"""`python -m bench`: the ladder, the verdict, the peers, and the record of it all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import pipeline
from presets import PRESETS, Pretrain
from runlog import Bar, RunLog

from . import ceilings, contest, record, show
from .ladder import Ladder, Setting
from .measure import Clock, Ranks, Work
from .photos import draw_photos
from .record import Rung
from .verdict import DECODE, E2E, Feed, bounds, verdict

_SAMPLE = 32  # encoded images that the small measurements use
_MANY_READERS = 32
_RUNGS = 10

Before = Callable[[], None]


@dataclass(frozen=True)
class Bench:
    """Where does the throughput go? Measures every rung from disk to update, and the peers beside it."""

    data: Path | None = None
    """Folder of images [default: drawn photographs of 500 x 375 pixels and 97 kB, as ImageNet's are]."""
    images: int = 1024
    """At most so many of them take part."""
    size: int = 224
    """Side of a view, pixels."""
    batch_size: int | None = None
    """Images a step [default: 64 on a CPU, 512 on a GPU]."""
    preset: str | None = None
    """Whose network is trained [default: demo on a CPU, imagenet-1000e on a GPU]."""
    decoder: Literal["auto", *pipeline.DECODERS] = "auto"  # type: ignore[valid-type]
    threads: int | None = None
    """That decode [default: one a core, shared among the ranks of this machine]."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Fewer and shorter measurements: within a minute on two cores."""
    peers: bool = True
    """Measure other pipelines as well, on one core."""
    json: Path | None = None
    """File for the record of this run."""


def main(arguments: list[str]) -> int:
    config = tyro.cli(Bench, args=arguments, prog="python -m bench")
    ranks = Ranks.started(dict(os.environ))
    with RunLog() as log:
        result = measure(config, ranks, log)
        if ranks.rank == 0:
            show.record(result, log)
            if config.json:
                result.write(config.json)
                log.say(f"written to {config.json}")
    return 0


def measure(config: Bench, ranks: Ranks, log: RunLog) -> record.Record:
    name = config.device
    if ranks.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pipeline.find_device(name)
    gpu = device.type == "cuda"
    preset_name = config.preset or ("imagenet-1000e" if gpu else "demo")
    if preset_name not in PRESETS:
        raise ValueError(f"unknown preset {preset_name!r}: choose one of {', '.join(PRESETS)}")
    preset: Pretrain = PRESETS[preset_name]()
    threads = config.threads or max(1, pipeline.usable_cores() // ranks.local_world)
    torch.set_num_threads(threads)

    folder = config.data
    if folder is None:
        with log.bar("drawing photographs, once") as bar:
            count = 128 if config.quick else min(config.images, 512)
            if ranks.rank == 0:
                folder = draw_photos(pipeline.cache_folder() / f"photos-{count}", count, progress=bar)
            ranks.meet()
            folder = pipeline.cache_folder() / f"photos-{count}"
    with log.bar(f"indexing {folder}") as bar:
        whole = pipeline.open_store(folder, bar)
    store = pipeline.at_most(config.images, whole)
    wanted = config.batch_size or (512 if gpu else 32 if config.quick else 64)
    batch_size = min(wanted, len(store))
    setting = Setting(store, config.size, batch_size, config.decoder, threads, device, preset.model, preset.optim)
    ladder = Ladder(setting)
    clock = Clock(device, ranks, *((0.4, 3) if config.quick else (2.0, 5)))
    with log.bar("the ladder") as bar:
        rungs = climb(ladder, clock, bar)
    encoded = ladder.memory.read_batch(np.arange(len(store)))
    mean_bytes = sum(map(len, encoded)) / len(encoded)
    feed = Feed(
        rates={rung.name: rung.rates.median for rung in rungs},
        on_gpu=gpu,
        decodes_on_gpu=gpu and ladder.loader.decoder.name == "dali",
        cores=threads,
        long_side=float(np.maximum(store.index["width"], store.index["height"]).mean()),
        smaller_decode=_smaller_decode(encoded[:_SAMPLE]),
        cold=mean_bytes * len(whole) > 0.7 * 2**30 * record.memory_gib(),
    )
    contenders = []
    if config.peers and ranks.world == 1:
        with log.bar("the peers, in turns on one core") as bar:
            contenders = contest.contest(ladder.memory, config.size, config.quick, bar)
    index = store.index
    return record.Record(
        command=record.command(),
        commit=record.commit(),
        versions=record.versions(),
        machine=record.machine(device),
        data=record.Data(
            name="drawn photographs" if config.data is None else Path(config.data).name,
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
        },
        rungs=rungs,
        contenders=contenders,
        bounds=bounds(feed),
        verdict=verdict(feed),
    )


def climb(ladder: Ladder, clock: Clock, bar: Bar) -> list[Rung]:
    """All rungs, from the disk upwards."""
    setting, device = ladder.setting, ladder.device
    gpu, threads = device.type == "cuda", setting.threads
    encoded = ladder.memory.read_batch(np.arange(min(_SAMPLE, len(ladder.memory))))
    mean_bytes = sum(map(len, encoded)) / len(encoded)
    pixels = 2 * 3 * setting.size**2
    decodes_on = "GPU" if gpu and ladder.loader.decoder.name == "dali" else "cores"
    rungs: list[Rung] = []
    rate: dict[str, float] = {}

    def rung(
        name: str, what: str, work: Work, on: str, ceiling: tuple[float | None, str], before: Before = _nothing
    ) -> None:
        bar(len(rungs), _RUNGS + gpu, name)
        alone = clock.alone(work, before)
        ranks = clock.together(work, before)
        rate[name] = ranks[0].median
        rungs.append(Rung(name, what, ranks[0], on, *ceiling, ranks=ranks if len(ranks) > 1 else [], alone=alone))

    def together(*names: str) -> float:
        return 1 / sum(1 / rate[name] for name in names)

    rung("plan", "order, draw, labels: what a batch is made of", ladder.plan, "one core", (None, ""))
    many = clock.together(ladder.read(_MANY_READERS), ladder.forget_files)[0].median
    rung(
        *("read, cold", f"encoded images from the disk, {threads} at a time", ladder.read(threads), "disk"),
        (many, f"{_MANY_READERS} at a time"),
        ladder.forget_files,
    )
    copied = ceilings.reading(mean_bytes)
    rung("read, warm", "the same from the system's memory", ladder.read(threads), "cores", (copied, "a copy in memory"))
    bare = ceilings.decoding(encoded, threads)
    rung("decode", "whole images, from memory", ladder.decode, decodes_on, (bare, "libjpeg-turbo's call alone"))
    rung(DECODE, "the same, cut and resized twice", ladder.crops, decodes_on, (rate["decode"], "decode"))
    written = ceilings.writing(4 * pixels, device, threads)
    on = "GPU" if gpu else "cores"
    rung("distort", "crops to finished views", ladder.distort, on, (written, "writing the views"))
    if gpu:
        moved = ceilings.copying(pixels, device)
        rung("copy to the GPU", "crops to the device", ladder.copy, "bus", (moved, "one large copy"))
    parts = ("plan", "read, warm", DECODE, "distort")
    summed = together(*parts) if not gpu else min(together(*parts[:3]), rate["distort"])
    rung("feed", "all of that at once, from warm files", ladder.feed, on, (summed, "its parts"))
    if threads > 1 and not gpu and clock.ranks.world == 1:
        linear = (rate["feed"] / threads, f"{threads} cores shared out")
        rung("feed, one core", "the same on one core", ladder.feed_on_one_core, "one core", linear)
    flop = ceilings.arithmetic(setting.network, setting.size, device)
    rung("step", "training on resident views", ladder.step, on, (flop, "its multiplications alone"))
    both = together("feed", "step") if not gpu else min(rate["feed"], rate["step"])
    rung(E2E, "the feed and the step at once: training", ladder.end_to_end, on, (both, "its parts"))
    return rungs


def _smaller_decode(encoded: list[bytes]) -> float | None:
    """How many times as fast images decode at no more than 400 px a side; None where that cannot be said."""
    whole, small = ceilings.decoding(encoded, 1), ceilings.decoding(ceilings.smaller(encoded, 400), 1)
    return None if whole is None or small is None else small / whole


def _nothing() -> None: ...
