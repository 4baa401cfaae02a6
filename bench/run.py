"""`python -m bench`: where does the throughput of training go on this machine?

A run measures the throughput of every stage from disk to update (`stage_names.py`), each beside
its roofline: the throughput that the machine allows for that stage at most. From these figures
follow the bottleneck and the change that would help most (`resource_bounds.py`, and in words
`bottleneck_report.py`). Other projects' pipelines are measured beside twinfeed's
(`peer_comparison.py`). Everything becomes one `Record`, which is printed and, with `--json`,
written to a file.

Read next: `stage_benchmark.py`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch

import pipeline
from experiment import PRESETS, Console, Pretrain, provenance
from pipeline import Store
from pipeline.formats.record_store import RecordStore

from . import peer_comparison, record, rooflines, tables
from .bottleneck_report import verdict
from .options import BenchOptions
from .photos import draw_photos
from .readable_images import decodable_images, without_unreadable
from .record import Data, PeerResult, Record
from .resource_bounds import SMALL, StageRates, bounds, shuffle_block
from .stage_benchmark import FULL, QUICK, StageBenchmark
from .stages import Stages, StageSettings
from .timing import RankGroup

_SAMPLE = 32  # encoded images that the rooflines of decoding are measured with
# Data beyond this fraction of the memory are not taken to stay in the system's file cache.
_CACHED_FRACTION = 0.7


def main(options: BenchOptions, console: Console) -> int:
    """Measure, print the record, and write it if asked to."""
    ranks = RankGroup.from_environment(dict(os.environ))
    result = measure(options, ranks, console)
    tables.print_stages(result, console)
    if options.json and ranks.rank == 0:
        result.write(options.json)
        console.print(f"written to {options.json}")
    return 0


def measure(options: BenchOptions, ranks: RankGroup, console: Console) -> Record:
    """Measure everything that was asked for, on all ranks together."""
    settings, whole = prepare(options, ranks, console)
    with console.progress_bar(f"reading {len(settings.store):,} images"):
        stages = Stages(settings, ranks.rank, ranks.world_size)
        sample = decodable_images(stages.encoded[:_SAMPLE], settings.store)
        if not sample:
            raise ValueError(
                f"none of the first {_SAMPLE} images ({settings.store.name(0)}, ...) can be "
                "decoded: use another --data folder"
            )
        conditions = describe_conditions(stages, whole, sample)
    with console.progress_bar("the stages") as bar:
        repeats = QUICK if options.quick else FULL
        benchmark = StageBenchmark(stages, conditions, sample, ranks, repeats, bar)
        results = benchmark.run()
    bad = {settings.store.name(i): reason for i, reason in stages.loader.bad.items()}
    console.print_rejects("replaced", bad)

    peers: list[PeerResult] = []
    if options.peers and ranks.world_size == 1:
        peers = measure_peers(options, stages, console)
    return Record(
        command=record.command(sys.argv[1:], ranks.world_size),
        commit=record.commit(),
        versions=record.versions(),
        machine=record.machine(settings.device),
        data=describe_data(options, stages),
        settings=describe_settings(options, stages, ranks),
        stages=results,
        peers=peers,
        bounds=bounds(benchmark.measured),
        verdict=verdict_of_rank(benchmark.measured, ranks),
    )


def prepare(
    options: BenchOptions, ranks: RankGroup, console: Console
) -> tuple[StageSettings, Store]:
    """Choose what is not given and open the images; return the settings and the whole store."""
    device = find_device(options.device, ranks)
    on_gpu = device.type == "cuda"
    preset: Pretrain = PRESETS[options.preset or ("imagenet-1000e" if on_gpu else "demo")]()
    threads = options.threads or max(1, pipeline.usable_cores() // ranks.local_world_size)
    torch.set_num_threads(threads)

    whole = open_images(options, ranks, console)
    store = without_unreadable(pipeline.random_subset(options.images, whole), console)
    fewest = max(2, ranks.world_size)
    if len(store) < fewest:
        raise ValueError(f"at least {fewest} images are needed, found {len(store)}")
    default_batch = 512 if on_gpu else 64
    if options.quick and not on_gpu:
        default_batch = 32
    settings = StageSettings(
        store=store,
        size=options.size,
        batch_size=min(options.batch_size or default_batch, len(store)),
        decoder=options.decoder,
        threads=threads,
        device=device,
        network=preset.model,
        optim=preset.optim,
    )
    return settings, whole


def find_device(name: str, ranks: RankGroup) -> torch.device:
    """The device of this rank; under torchrun each rank has a GPU of its own."""
    if ranks.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return pipeline.find_device(name)


def open_images(options: BenchOptions, ranks: RankGroup, console: Console) -> Store:
    """The user's images, or generated photographs."""
    folder = options.data
    if folder is None:
        count = 128 if options.quick else min(options.images, 512)
        folder = pipeline.cache_folder() / f"photos-{count}"
        with console.progress_bar("generating photographs, once") as bar:
            if ranks.rank == 0:
                draw_photos(folder, count, progress=bar)
            ranks.barrier()
    with console.progress_bar(f"indexing {folder}") as bar:
        store = pipeline.open_store(folder, bar)
    console.print_rejects("left out", store.rejects)
    return store


def describe_conditions(stages: Stages, whole: Store, sample: list[bytes]) -> StageRates:
    """What the verdict needs besides the rates.

    Args:
        stages: The work, on some of the images.
        whole: The store of all images.
        sample: Some encoded images that decode.
    """
    settings = stages.settings
    on_gpu = settings.device.type == "cuda"
    index = settings.store.index
    total_bytes = mean_bytes(stages) * len(whole)
    if "bytes" in (whole.index.dtype.names or ()):
        total_bytes = float(whole.index["bytes"].sum(dtype=np.int64))
    return StageRates(
        rates={},
        on_gpu=on_gpu,
        decodes_on_gpu=on_gpu and stages.loader.decoder.name == "dali",
        cores=settings.threads,
        long_side=float(np.maximum(index["width"], index["height"]).mean()),
        small_decode_speedup=rooflines.small_decode_speedup(sample, SMALL),
        exceeds_memory=total_bytes > _CACHED_FRACTION * 2**30 * provenance.memory_gib(),
        in_record_files=isinstance(whole, RecordStore),
        shuffle_block=shuffle_block(total_bytes / len(whole)),
    )


def measure_peers(options: BenchOptions, stages: Stages, console: Console) -> list[PeerResult]:
    """The other projects' pipelines on the first images that decode."""
    images = decodable_images(stages.encoded[: peer_comparison.IMAGES], stages.settings.store)
    with console.progress_bar("other pipelines, in turn on one core") as bar:
        return peer_comparison.compare(images, options.size, options.quick, bar)


def mean_bytes(stages: Stages) -> float:
    """The mean size of the encoded images."""
    return sum(len(data) for data in stages.encoded) / len(stages.encoded)


def describe_data(options: BenchOptions, stages: Stages) -> Data:
    """The data of the record, without the name of any folder above them."""
    name = "drawn photographs"
    if options.data is not None:
        name = f"images of {options.data.resolve().name}"
    index = stages.settings.store.index
    return Data(
        name=name,
        images=len(stages.settings.store),
        mean_bytes=mean_bytes(stages),
        mean_width=float(index["width"].mean()),
        mean_height=float(index["height"].mean()),
    )


def describe_settings(options: BenchOptions, stages: Stages, ranks: RankGroup) -> dict[str, Any]:
    """The settings of the record."""
    settings = stages.settings
    return {
        "size": settings.size,
        "batch_size": settings.batch_size,
        "decoder": stages.loader.decoder.name,
        "threads": settings.threads,
        "ranks": ranks.world_size,
        "network": record.describe_network(settings.network),
        "quick": options.quick,
        "cold_read_from_disk": stages.fraction_from_disk(),
    }


def verdict_of_rank(measured: StageRates, ranks: RankGroup) -> list[str]:
    """The verdict. Among several ranks, it begins with a note that it is about each of them."""
    first, *others = verdict(measured)
    if ranks.world_size > 1:
        first = f"On each of {ranks.world_size} ranks, while all of them work: {first}"
    return [first, *others]
