"""Batches: what is in them, what happens to images that turn bad, and what is left when nobody wants more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.loader
from bench.stages import bytes_read_from_disk
from pipeline import (
    FOR_ANY_STORE,
    Batch,
    Loader,
    LoaderOptions,
    Store,
    Subset,
    barlow_twins,
    center_view,
    open_loader,
    open_store,
)
from pipeline.formats.index import ROW
from pipeline.formats.record_store import RecordStore
from pipeline.machine import single_threaded_workers
from pipeline.order import Samples, epoch_order
from tests.helpers.images import write_photos
from tests.helpers.stores import as_records

SEED, BATCH = 7, 6
RECIPE = barlow_twins(24)


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """26 images that a test may spoil: four whole batches of six, and two."""
    return write_photos(tmp_path, 26)


def loader_of(store: Store, batch_size: int = BATCH, **options: Any) -> Loader:
    return open_loader(
        store, RECIPE, LoaderOptions(batch_size=batch_size, threads=2, seed=SEED, **options)
    )


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    """To the bit."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for x, y in zip((*left.views, *left[1:]), (*right.views, *right[1:]), strict=True):
            assert torch.equal(x, y)


# ── what is in a batch ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_holds_two_views_and_the_labels_of_its_samples(photos: Path) -> None:
    store = open_store(photos)
    loader = loader_of(store, 16)
    assert len(loader) == 3
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    for batch in batches:
        assert [view.shape for view in batch.views] == [(16, 3, 24, 24)] * 2
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
        assert batch.labels.dtype == batch.samples.dtype == torch.int64
        folders = [Path(store.name(sample)).parent.name for sample in batch.samples.tolist()]
        assert folders == [store.classes[label] for label in batch.labels.tolist()]
    samples = torch.cat([batch.samples for batch in batches])
    assert len(samples.unique()) == 48
    assert samples.tolist() == epoch_order(60, SEED, 0)[:48].tolist()
    assert loader.bad == {}


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_without_shuffle_samples_come_in_order_and_the_last_batch_is_short(
    photos: Path, decoder: str
) -> None:
    loader = loader_of(open_store(photos), 16, shuffle=False, decoder=decoder)
    assert len(loader) == 4
    batches = list(loader.epoch(3))
    assert [len(batch.samples) for batch in batches] == [16, 16, 16, 12]
    assert [len(batch.views[0]) for batch in batches] == [16, 16, 16, 12]
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(60))


def test_images_without_classes_have_the_label_minus_one(photos: Path) -> None:
    (batch,) = loader_of(open_store(photos / "class0"), 20).epoch(0)
    assert batch.labels.tolist() == [-1] * 20


def test_views_come_in_the_type_asked_for(photos: Path) -> None:
    store = open_store(photos)
    (exact,), (half,) = (
        loader_of(store, 60, dtype=dtype).epoch(0) for dtype in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(exact.views, half.views, strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
        assert b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_a_loader_can_be_run_again_and_twice_at_once(photos: Path, decoder: str) -> None:
    loader = loader_of(open_store(photos), 20, decoder=decoder)
    once = list(loader.epoch(0))
    pairs = list(zip(loader.epoch(0), loader.epoch(0), strict=True))
    assert_same([a for a, _ in pairs], once)
    assert_same([b for _, b in pairs], once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size is 0: it must be at least 1"),
        (
            {"batch_size": 61},
            "60 images are fewer than one batch of 61: take a batch size of at most 60",
        ),
        (
            {"batch_size": 31, "world": 2},
            "60 images are fewer than one batch of 62: take a batch size of at most 30",
        ),
        ({"shuffle_block": 0}, "blocks of 0 samples cannot be shuffled: they must have at least 1"),
        ({"rank": 2, "world": 2}, "rank 2 is outside a world of 2"),
        ({"decoder": "jpeg9000"}, "unknown decoder 'jpeg9000': choose auto or .*torchvision"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_with_the_remedy(
    photos: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(open_store(photos), **options)


# ── fetching ahead ───────────────────────────────────────────────────────────────────────────────────────────────────


class Fetching(Subset):
    """A store that notes what it is asked for, and what has been read by then."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, np.arange(len(store)))
        self.asked: list[int] = []
        self.missing: list[int] = []

    def prefetch(self, first: int, last: int) -> None:
        assert 0 <= first < last <= len(self)
        self.asked += range(first, last)

    def read_batch(self, samples: Samples) -> list[bytes]:
        self.missing += set(samples.tolist()) - set(self.asked)
        return super().read_batch(samples)


class AtOnce:
    """An executor that keeps nothing for later."""

    def __init__(self, workers: int, name: str) -> None: ...

    def submit(self, function: Callable[..., None], *arguments: int) -> None:
        function(*arguments)

    def shutdown(self, cancel_futures: bool) -> None: ...


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(("world", "block"), [(1, 7), (2, 7), (1, 1), (1, 60)])
def test_each_window_is_asked_for_once_an_epoch_and_before_it_is_read(
    photos: Path, decoder: str, world: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks make a window here, so that there are many."""
    for module in (pipeline.order, pipeline.loader):
        monkeypatch.setattr(module, "BLOCKS_MIXED", 2)
    monkeypatch.setattr(pipeline.loader, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(pipeline.loader, "_FETCHED", 5)
    for rank in range(world):
        store = Fetching(open_store(photos))
        loader = loader_of(
            store, 6 // world, shuffle_block=block, decoder=decoder, rank=rank, world=world
        )
        for epoch in range(3):
            store.asked.clear()
            list(loader.epoch(epoch))
            assert store.missing == []
            assert sorted(store.asked) == list(range(60))
        store.asked.clear()
        list(loader.epoch(0, 5))  # as after a resume, in the middle of the order
        assert store.missing == []
        assert len(store.asked) == len(set(store.asked))
        gone = [int(sample) for sample in epoch_order(60, SEED, 0, block)[: 30 - 2 * block]]
        assert set(store.asked).isdisjoint(gone)


def test_no_more_than_one_window_is_asked_for_ahead(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline.order, pipeline.loader):
        monkeypatch.setattr(module, "BLOCKS_MIXED", 2)
    monkeypatch.setattr(pipeline.loader, "ThreadPoolExecutor", AtOnce)
    store = Fetching(open_store(photos))
    loader = loader_of(store, shuffle_block=5)
    asked = [len(store.asked) for _ in loader._fetch_ahead(loader.plan(0, 10), 5, store.prefetch)]
    assert asked == [
        20,
        30,
        30,
        40,
        40,
        50,
        60,
        60,
        60,
        60,
    ]  # windows of 10, batches of 6: 12 reaches into the second


def test_records_in_blocks_are_the_batches_of_the_folder_in_blocks(
    photos: Path, tmp_path: Path
) -> None:
    folder = open_store(photos)
    records = as_records(folder, tmp_path)
    expected = list(loader_of(folder, shuffle_block=1).epoch(2))
    assert torch.cat([b.samples for b in expected]).tolist() == epoch_order(60, SEED, 2, 1).tolist()
    assert_same(list(loader_of(records, shuffle_block=1).epoch(2)), expected)
    assert len(list(loader_of(Subset(records, np.arange(3, 50)), shuffle_block=1).epoch(0))) == 7
    assert len(list(loader_of(records, shuffle_block=1, shuffle=False).epoch(0))) == 10


def test_fetching_that_fails_or_hangs_on_changes_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Fetching, first: int, last: int) -> None:
        threading.Event().wait(0.05)
        raise OSError("the disk is on fire")

    expected = list(loader_of(open_store(photos), shuffle_block=1).epoch(0))
    monkeypatch.setattr(Fetching, "prefetch", fail)
    loader, before = (
        loader_of(Fetching(open_store(photos)), shuffle_block=1),
        set(threading.enumerate()),
    )
    assert_same(list(loader.epoch(0)), expected)
    close(loader)
    assert set(threading.enumerate()) == before


def test_a_subset_of_records_has_what_lies_around_its_samples_fetched(photos: Path) -> None:
    store = Fetching(open_store(photos))
    Subset(store, np.array([3, 5, 8, 20])).prefetch(1, 3)
    assert store.asked == [5, 6, 7, 8]
    Subset(open_store(photos), np.arange(4)).prefetch(
        0, 4
    )  # a folder fetches nothing, and does not mind


def test_all_that_is_asked_for_is_fetched_from_the_disk(tmp_path: Path) -> None:
    """More than Linux fetches at one request, whatever is asked for: what the disk takes at once, 8 MiB where seen."""
    image, path = bytes(100_000), tmp_path / "a.records"
    path.write_bytes(bytes(50_000) + 400 * image)
    rows = np.zeros(400, ROW)
    rows["bytes"], rows["offset"] = len(image), 50_000 + len(image) * np.arange(400)
    store = RecordStore(path, [path], rows, [])

    def read(work: Callable[[], object]) -> int:
        """Bytes that the disk gives."""
        os.sync()
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            before = bytes_read_from_disk()
            work()
            return (bytes_read_from_disk() or 0) - (before or 0)

    if not read(path.read_bytes):
        pytest.skip("the temporary folder is not on a disk whose reads are counted")
    assert 38e6 < read(lambda: store.prefetch(10, 390)) < 39e6


# ── images that turn bad ─────────────────────────────────────────────────────────────────────────────────────────────


def spoil(store: Store, samples: list[int]) -> None:
    """In turn: cut short, removed, replaced by one of another size."""
    for i, sample in enumerate(samples):
        path = Path(store.name(sample))
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:-60])
        elif i % 3 == 1:
            path.unlink()
        else:
            path.write_bytes(Path(store.name((sample + 1) % len(store))).read_bytes())


REASONS = ("truncated", "cannot be read, or is empty", "when it was indexed")


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(
    ("spoilt", "stand_ins"),
    [  # positions in the order of epoch 0: p is replaced by p + 6, p + 12, ... modulo 26; batches of 6
        ([8], {8: 14}),
        ([7, 8, 11], {7: 13, 8: 14, 11: 17}),
        ([1, 7], {1: 13, 7: 13}),  # the first that could stand in is bad as well
        ([20, 23], {20: 0, 23: 3}),
        ([2, 8, 14, 20], {2: 6, 8: 0, 14: 0, 20: 0}),  # for 2 not 0, which is in its own batch
        (
            [0, 2, 8, 14, 20],
            {0: 6, 2: 12, 8: 12, 14: 6, 20: 6},
        ),  # for 2 not 6, which stands in for 0 already
    ],
    ids=str,
)
def test_bad_images_are_replaced_from_the_same_place_of_later_batches(
    own_photos: Path, spoilt: list[int], stand_ins: dict[int, int], decoder: str
) -> None:
    store = open_store(own_photos)
    order = epoch_order(26, SEED, 0)
    good = list(loader_of(store, decoder=decoder).epoch(0))
    spoil(store, order[spoilt].tolist())
    loader = loader_of(store, decoder=decoder)
    batches = list(loader.epoch(0))

    expected = order[:24].copy()
    expected[list(stand_ins)] = order[list(stand_ins.values())]
    assert torch.cat([batch.samples for batch in batches]).tolist() == expected.tolist()
    for batch, before in zip(batches, good, strict=True):
        assert len(batch.samples.unique()) == BATCH
        assert batch.labels.tolist() == store.index["label"][batch.samples].tolist()
        kept = batch.samples == before.samples
        for a, b in zip(batch.views, before.views, strict=True):
            torch.testing.assert_close(a[kept], b[kept], rtol=0, atol=1e-5)
            assert all(not torch.equal(a[i], b[i]) for i in np.flatnonzero(~kept))
    assert sorted(loader.bad) == sorted(order[spoilt].tolist())
    for i, position in enumerate(spoilt):
        assert REASONS[i % 3] in loader.bad[int(order[position])]

    assert_same(list(loader.epoch(0)), batches)  # all bad ones are known now
    for first in range(1, 4):  # as after a resume, where none is
        assert_same(list(loader_of(store, decoder=decoder).epoch(0, first)), batches[first:])


def test_ranks_replace_bad_images_as_one_does(own_photos: Path) -> None:
    store = open_store(own_photos)
    spoil(store, epoch_order(26, SEED, 0)[[1, 7, 9, 22]].tolist())
    whole = loader_of(store).epoch(0)
    ranks = [loader_of(store, BATCH // 2, rank=rank, world=2).epoch(0) for rank in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.samples, torch.cat([part.samples for part in parts]))


def test_a_stand_in_has_the_views_of_its_own_sample(own_photos: Path) -> None:
    store = open_store(own_photos)
    order = epoch_order(26, SEED, 0)
    good = list(loader_of(store).epoch(0))
    spoil(store, [int(order[3])])
    batches = list(loader_of(store).epoch(0))
    for a, b in zip(
        batches[0].views, good[1].views, strict=True
    ):  # 3 + 6 = 9: place 3 of the next batch
        torch.testing.assert_close(a[3], b[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["found out", "known before"])
@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_without_shuffle_bad_images_are_left_out(
    own_photos: Path, decoder: str, known: bool
) -> None:
    store = open_store(own_photos)
    good = list(loader_of(store, shuffle=False, decoder=decoder).epoch(0))
    spoil(store, [1, 4, *range(12, 18), 25])
    loader = loader_of(store, shuffle=False, decoder=decoder)
    if known:
        list(loader.epoch(0))
    batches = list(loader.epoch(0))
    left = [[0, 2, 3, 5], [6, 7, 8, 9, 10, 11], [18, 19, 20, 21, 22, 23], [24]]
    assert [batch.samples.tolist() for batch in batches] == left
    assert sorted(loader.bad) == [1, 4, *range(12, 18), 25]
    for batch, before in zip(batches, [good[0], good[1], good[3], good[4]], strict=True):
        kept = torch.isin(before.samples, batch.samples)
        assert torch.equal(batch.labels, before.labels[kept])
        for a, b in zip(batch.views, before.views, strict=True):
            torch.testing.assert_close(a, b[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_where_no_image_is_left_the_error_names_files(own_photos: Path, decoder: str) -> None:
    store = open_store(own_photos)
    for i in range(26):
        Path(store.name(i)).unlink()
    with pytest.raises(
        ValueError, match=r"(?s)cannot be decoded.*class\d/00\d\d\.jpg: it cannot be read"
    ):
        list(loader_of(store, decoder=decoder).epoch(0))


# ── what is left behind ──────────────────────────────────────────────────────────────────────────────────────────────


class Moody(Subset):
    """A store whose disk fails the first time it reads a certain sample."""

    def __init__(self, store: Store, fails_at: int) -> None:
        super().__init__(store, np.arange(len(store)))
        self.fails_at = fails_at

    def read_batch(self, samples: Samples) -> list[bytes]:
        if self.fails_at in samples:
            self.fails_at = -1
            raise RuntimeError("the disk is on fire")
        return super().read_batch(samples)


def break_out(loader: Loader) -> None:
    for _ in loader.epoch(0):
        break


def close(loader: Loader) -> None:
    batches = loader.epoch(0)
    next(batches)
    batches.close()


def drop(loader: Loader) -> None:
    batches = loader.epoch(0)
    next(batches)
    next(batches)
    del batches


def never_begin(loader: Loader) -> None:
    loader.epoch(0)
    loader.epoch(0).close()


def run_out(loader: Loader) -> None:
    assert len(list(loader.epoch(0))) == len(loader)


def fail_in_the_consumer(loader: Loader) -> None:
    def consume() -> None:
        for _ in loader.epoch(0):
            raise KeyError("in the training step")

    with pytest.raises(KeyError):
        consume()


@pytest.mark.parametrize(
    "leave", [break_out, close, drop, never_begin, run_out, fail_in_the_consumer]
)
@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_no_thread_outlives_its_iterator(
    photos: Path, decoder: str, leave: Callable[[Loader], None]
) -> None:
    loader = loader_of(open_store(photos), decoder=decoder)
    before = set(threading.enumerate())
    for _ in range(20):
        leave(loader)
        assert set(threading.enumerate()) == before


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_an_error_while_reading_reaches_the_consumer_and_leaves_no_thread(
    photos: Path, decoder: str
) -> None:
    order = epoch_order(60, SEED, 0)
    before = set(threading.enumerate())
    for _ in range(20):
        loader = loader_of(
            Moody(open_store(photos), fails_at=int(order[31])), decoder=decoder
        )  # in batch 5
        seen: list[Batch] = []
        with pytest.raises(RuntimeError, match="the disk is on fire"):
            seen.extend(loader.epoch(0))
        assert len(seen) <= 5
        assert set(threading.enumerate()) == before
        assert loader.bad == {}


def test_an_iterator_that_is_left_waiting_can_be_closed(photos: Path) -> None:
    """Its thread stands before a full queue."""
    loader = loader_of(open_store(photos))
    before = set(threading.enumerate())
    batches = loader.steps(0, 1000)
    next(batches)
    threading.Event().wait(0.5)
    batches.close()
    assert set(threading.enumerate()) == before


def threads_of_torch() -> tuple[int, int]:
    """In this thread, and in one made now."""
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), elsewhere[0]


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_torchs_own_threads_stay_as_they_were(photos: Path, decoder: str) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = loader_of(open_store(photos), decoder=decoder)
        for _ in loader.epoch(0):
            assert threads_of_torch() == (3, 3)
        assert threads_of_torch() == (3, 3)
    finally:
        torch.set_num_threads(usual)


def test_workers_run_torch_on_their_own_thread_alone() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_threaded_workers(2, "test") as pool:
            assert [pool.submit(torch.get_num_threads).result() for _ in range(8)] == [1] * 8
    finally:
        torch.set_num_threads(usual)


def test_torchs_own_threads_stay_as_they_were_when_loaders_begin_at_once() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(15):
            together = threading.Barrier(4)

            def begin(together: threading.Barrier = together) -> None:
                together.wait()
                single_threaded_workers(2, "test").shutdown()

            threads = [threading.Thread(target=begin) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert threads_of_torch() == (3, 3)
    finally:
        torch.set_num_threads(usual)


def test_test_views_pass_through_the_same_loader(photos: Path) -> None:
    loader = open_loader(
        open_store(photos), center_view(32), LoaderOptions(batch_size=25, threads=2, shuffle=False)
    )
    batches = list(loader.epoch(0))
    assert [[view.shape for view in batch.views] for batch in batches] == [
        [(25, 3, 32, 32)],
        [(25, 3, 32, 32)],
        [(10, 3, 32, 32)],
    ]
    assert_same(list(loader.epoch(9)), batches)
