"""The work of each stage: which images it reads, decodes, crops and counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline
from bench.readable_images import decodable_images, without_unreadable
from bench.stages import Stages, StageSettings, bytes_read_from_disk
from experiment import PRESETS, Console
from pipeline import MemoryStore, Store
from pipeline.decoders import cpu
from tests.helpers.images import encoded, picture
from tests.helpers.stores import as_records

CPU = torch.device("cpu")


def settings_for(store: Store, threads: int = 2) -> StageSettings:
    preset = PRESETS["demo"]()
    return StageSettings(
        store=store,
        size=24,
        batch_size=8,
        decoder="cpu",
        threads=threads,
        device=CPU,
        network=preset.model,
        optim=preset.optim,
    )


def open_stages(folder: Path, rank: int = 0, world_size: int = 1) -> Stages:
    return Stages(settings_for(pipeline.open_store(folder)), rank, world_size)


def test_a_cold_read_reads_every_image_once(forty: Path) -> None:
    for threads in (1, 2, 32):
        assert sum(open_stages(forty).cold_read(threads)()) == 40


def test_ranks_share_a_cold_read(forty: Path) -> None:
    ranks = [open_stages(forty, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(np.concatenate([stages.own_samples for stages in ranks])) == list(range(40))
    assert [sum(stages.cold_read(2)()) for stages in ranks] == [14, 13, 13]


def is_on_counted_disk(path: Path) -> bool:
    """Whether this file can be dropped from the file cache, and the system counts its reads."""
    os.sync()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = bytes_read_from_disk()
        file.read()
    after = bytes_read_from_disk()
    return before is not None and after is not None and after > before


def skip_unless_on_counted_disk(path: Path) -> None:
    if not is_on_counted_disk(path):
        pytest.skip("the temporary folder is not on a disk with counted reads")


def test_a_cold_read_comes_from_the_disk(forty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_on_counted_disk(forty / "class0" / "0000.jpg")
    stages = open_stages(forty)
    assert (stages.fraction_from_disk() or 0) > 0.9
    monkeypatch.setattr(stages, "forget_files", lambda: None)
    assert stages.fraction_from_disk() == 0


def test_a_cold_read_of_records_comes_from_the_disk(forty: Path, tmp_path: Path) -> None:
    """Also if only some of the records are used: the whole file is dropped from the cache."""
    records = as_records(pipeline.open_store(forty), tmp_path)
    skip_unless_on_counted_disk(records.files[0])
    some = pipeline.random_subset(30, records)
    some_of_some = pipeline.random_subset(25, some)
    for store in (records, some, some_of_some):
        assert (Stages(settings_for(store, threads=1)).fraction_from_disk() or 0) > 0.9


def test_decode_decodes_whole_images_and_crops_follow_the_recipe(
    forty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watches the decoded pixels, and the size of the crops that are made of them."""
    made: list[tuple[tuple[int, ...], int]] = []
    crop = cpu.crop_and_resize

    def watched(
        pixels: torch.Tensor, box: Any, size: int, *rest: Any, **named: Any
    ) -> torch.Tensor:
        made.append((tuple(pixels.shape[1:]), size))
        return crop(pixels, box, size, *rest, **named)

    monkeypatch.setattr(cpu, "crop_and_resize", watched)
    stages = open_stages(forty)
    index = stages.settings.store.index
    whole = set(zip(index["height"].tolist(), index["width"].tolist(), strict=True))
    for work, views, size in ((stages.decode, 1, 1), (stages.decode_and_crop, 2, 24)):
        made.clear()
        stream = work()
        assert [next(stream) for _ in range(3)] == [8, 8, 8]
        stream.close()
        assert {side for _, side in made} == {size}
        assert {shape for shape, _ in made} <= whole
        assert len(made) >= 3 * 8 * views


def test_every_stage_counts_the_images_of_a_batch(forty: Path) -> None:
    stages = open_stages(forty)
    for stream in (
        stages.step(),
        stages.end_to_end(),
        stages.feed(),
        stages.distort(),
        stages.plan(),
    ):
        assert next(stream) == 8
        stream.close()


def test_a_warm_read_counts_sixteen_images_at_a_time_and_does_not_end(forty: Path) -> None:
    stream = open_stages(forty).warm_read()
    assert [next(stream) for _ in range(6)] == [16, 16, 8, 16, 16, 8]
    stream.close()


def test_the_training_step_is_built_once(forty: Path) -> None:
    stages = open_stages(forty)
    assert stages.train is stages.train


class DamagedStore(MemoryStore):
    """A store that has lost the contents of an image since it was indexed."""

    def read_batch(self, samples: Any) -> list[bytes]:
        return [b"" if sample == 2 else data for sample, data in self._numbered(samples)]

    def _numbered(self, samples: Any) -> list[tuple[int, bytes]]:
        return list(zip(samples, super().read_batch(samples), strict=True))


def test_images_that_have_become_unreadable_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [encoded(picture(20 + i, 30)) for i in range(4)]
    store = DamagedStore(images)
    with Console() as console:
        readable = without_unreadable(store, console)
    assert readable.read_batch(np.arange(3)) == [images[0], images[1], images[3]]
    assert store.name(2) in capsys.readouterr().out


def test_only_images_that_decode_are_decodable() -> None:
    images = [encoded(picture(60, 50, seed=i)) for i in range(3)]
    images[1] = images[1][:-300]
    store = MemoryStore(images)
    assert decodable_images(images, store) == [images[0], images[2]]
    assert decodable_images(images[:2], store) == [images[0]]
