"""The decoder `ffcv`: the same crops as those of `cpu` to the bit, errors, streams and threads."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import (
    LoaderOptions,
    Store,
    Subset,
    barlow_twins,
    center_view,
    hold_out,
    open_loader,
    open_store,
)
from pipeline.draw import draw
from pipeline.recipe import Recipe, crop_view, whole_view
from tests.helpers.betons import (
    FIELD_BYTES,
    HEADER_BYTES,
    IGNORE_FINALIZER,
    IGNORE_FORKS,
    TABLE_OFFSET,
    write_beton,
    write_with_ffcv,
)
from tests.helpers.images import (
    BAD_IMAGES,
    EXAMPLE_IMAGES,
    decoded_by_pillow,
    encoded,
    mean_difference,
    picture,
)
from tests.helpers.resources import NEEDS_PROC, resources_in_use
from tests.helpers.stores import FixedSizeStore, decoder_of, whole_images

pytestmark = [IGNORE_FINALIZER, IGNORE_FORKS, pytest.mark.usefixtures("ffcv")]

ROOT = Path(__file__).parents[3]
SIZE = 24
RECIPE = barlow_twins(SIZE)


def beton_of(path: Path, images: list[bytes]) -> Store:
    return open_store(
        write_beton(
            path / "x.beton", [(data, i % 3) for i, data in enumerate(images)], size=(41, 30)
        )
    )


@pytest.fixture
def forty(tmp_path: Path) -> Store:
    return beton_of(tmp_path, [encoded(picture(41, 30, seed=i)) for i in range(40)])


def drawn(store: Store, recipe: Recipe, batch: int = 7) -> list[Any]:
    """A decoder's plan with the drawn boxes of all samples, in order."""
    parts = np.array_split(np.arange(len(store)), -(-len(store) // batch))
    return [
        (p, draw(recipe, 0, 0, p, store.index["height"][p], store.index["width"][p]).boxes)
        for p in parts
    ]


def assert_as_cpu_decoder(store: Store, plan: list[Any], recipe: Recipe = RECIPE) -> np.ndarray:
    """Compare the crops of the two decoders to the bit; returns which samples were good."""
    ours = list(decoder_of("ffcv", store, recipe).stream(iter(plan)))
    expected = list(decoder_of("cpu", store, recipe).stream(iter(plan)))
    assert len(ours) == len(expected) == len(plan)
    for (crops, good), (expected_crops, expected_good) in zip(ours, expected, strict=True):
        assert np.array_equal(good, expected_good)
        assert torch.equal(crops[:, good], expected_crops[:, good])
    return np.concatenate([good for _, good in ours])


# Pixels


def test_crops_of_every_format_are_those_of_pillow(tmp_path: Path) -> None:
    store = beton_of(tmp_path, list(EXAMPLE_IMAGES.values()))
    for recipe in (RECIPE, crop_view(SIZE), whole_view(SIZE)):
        assert assert_as_cpu_decoder(store, drawn(store, recipe), recipe).all()
    ((crops, good),) = decoder_of("ffcv", store, RECIPE).stream([whole_images(range(len(store)))])
    assert good.all()
    for i, (name, data) in enumerate(EXAMPLE_IMAGES.items()):
        expected = decoded_by_pillow(data).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert all(mean_difference(crops[view, i], expected) <= 0.5 for view in range(2)), name


def test_raw_and_jpeg_images_written_by_ffcv_are_decoded(tmp_path: Path) -> None:
    from ffcv.fields import BytesField, IntField, RGBImageField

    pixels = [np.asarray(picture(60 + i, 50 + 2 * i, seed=i)) for i in range(16)]
    fields = {
        "text": BytesField(),
        "label": IntField(),
        "image": RGBImageField("smart", smart_threshold=3 * 70 * 70),
        "other": RGBImageField("raw"),
    }
    texts = [np.arange(i + 1, dtype=np.uint8) for i in range(16)]
    small = [np.zeros((2, 2, 3), np.uint8)] * 16
    path = write_with_ffcv(tmp_path / "x.beton", fields, [texts, list(range(16)), pixels, small])
    store = open_store(path)
    assert {data[:2] for data in store.read_batch(np.arange(16))} == {b"P6", b"\xff\xd8"}
    plan = drawn(store, center_view(32))
    assert assert_as_cpu_decoder(store, plan, center_view(32)).all()
    assert assert_as_cpu_decoder(store, drawn(store, RECIPE)).all()


def test_bad_images_do_not_affect_the_others_of_their_batch(tmp_path: Path) -> None:
    bad = [
        data for name, (data, _) in BAD_IMAGES.items() if name != "nothing" and "bomb" not in name
    ]
    images = [encoded(picture(41, 30, seed=i)) for i in range(24)]
    without_bad = list(
        decoder_of("ffcv", beton_of(tmp_path, images), RECIPE).stream([whole_images(range(24))])
    )
    places = np.random.default_rng(0).permutation(24)[: len(bad)]
    for place, data in zip(places, bad, strict=True):
        images[place] = data
    (tmp_path / "bad").mkdir()
    store = beton_of(tmp_path / "bad", images)
    good = assert_as_cpu_decoder(store, [whole_images(range(24))])
    assert sorted(np.flatnonzero(~good)) == sorted(places)
    ((crops, _),) = decoder_of("ffcv", store, RECIPE).stream([whole_images(range(24))])
    assert torch.equal(crops[:, good], without_bad[0][0][:, good])


def test_batches_of_two_epochs_are_those_of_the_cpu_decoder(tmp_path: Path) -> None:
    """On subsets of a subset of a beton, with bad images, shuffled and in order."""
    images = [encoded(picture(41, 30, seed=i)) for i in range(60)]
    for i in (3, 17, 18, 40):
        images[i] = images[i][: len(images[i]) // 2]
    train, held = hold_out(Subset(beton_of(tmp_path, images), np.arange(59, 3, -1)), 0.2, seed=0)
    for store, recipe, shuffle in ((train, RECIPE, True), (held, center_view(SIZE), False)):
        loaders = [
            open_loader(
                store,
                recipe,
                LoaderOptions(batch_size=8, decoder=name, threads=2, seed=1, shuffle=shuffle),
            )
            for name in ("ffcv", "cpu")
        ]
        for a, b in zip(*(loader.steps(0, 2 * len(loader)) for loader in loaders), strict=True):
            assert torch.equal(a.samples, b.samples)
            assert torch.equal(a.labels, b.labels)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert loaders[0].bad == loaders[1].bad
    assert loaders[0].decoder.name == "ffcv"


# Streams


def test_batches_may_have_any_size_and_are_not_overwritten(forty: Store) -> None:
    groups = [range(3), range(3, 5), range(5, 25), range(25, 26), range(0), range(26, 40), range(0)]
    decoder = decoder_of("ffcv", forty, RECIPE)
    ((whole, _),) = decoder.stream([whole_images(range(40))])
    streamed = list(decoder.stream(map(whole_images, groups)))
    assert [crops.shape[1] for crops, _ in streamed] == [len(group) for group in groups]
    assert [len(good) for _, good in streamed] == [len(group) for group in groups]
    for group, (crops, good) in zip(groups, streamed, strict=True):
        assert good.all()
        assert torch.equal(crops, whole[:, list(group)])
    assert list(decoder.stream([])) == []


def test_stream_takes_only_a_few_batches_ahead_from_an_endless_plan(forty: Store) -> None:
    taken = 0

    def plan() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield whole_images([taken % 40])

    stream = decoder_of("ffcv", forty, RECIPE).stream(plan())
    for done in range(1, 50):
        next(stream)
        assert done < taken <= done + 6
    stream.close()


@NEEDS_PROC
def test_many_streams_leave_no_thread_file_or_memory_behind(tmp_path: Path) -> None:
    images = [encoded(picture(500, 400, seed=i)) for i in range(24)]
    store = open_store(
        write_beton(tmp_path / "x.beton", [(data, 0) for data in images], size=(500, 400))
    )
    decoder = decoder_of("ffcv", store, barlow_twins(96))

    def open_streams(count: int) -> None:
        for i in range(count):
            stream = decoder.stream(whole_images(range(k, k + 6), 500, 400) for k in (0, 6, 12, 18))
            for _ in range(i % 5):  # closed before the first batch, in between, or at the end
                next(stream)
            stream.close()

    open_streams(15)
    before = resources_in_use()
    open_streams(20)
    after = resources_in_use()
    assert after.threads <= before.threads
    assert after.files <= before.files
    assert after.memory_mb - before.memory_mb < 20


def test_errors_of_the_plan_and_of_the_reading_thread_are_raised(
    forty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def plan() -> Iterator[Any]:
        yield whole_images([0])
        raise LookupError("no more")

    decoder = decoder_of("ffcv", forty, RECIPE)
    with pytest.raises(LookupError, match="no more"):
        list(decoder.stream(plan()))

    def failing(*_: Any) -> None:
        raise MemoryError("of FFCV's")

    monkeypatch.setattr(EpochIterator, "run_pipeline", failing)
    with pytest.raises(MemoryError, match="of FFCV's"):
        list(decoder.stream(map(whole_images, [[0], [1]])))


@pytest.mark.usefixtures("forty")
def test_number_of_threads_of_torch_does_not_change(tmp_path: Path) -> None:
    """In this thread and in those made later, in a process that has not imported FFCV before."""
    code = f"""
import threading, warnings
import numpy as np, torch
from pipeline import barlow_twins, open_store

def counts():
    numbers = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return numbers

warnings.simplefilter("ignore")
torch.set_num_threads(3)
from pipeline.decoders.ffcv import FfcvDecoder
seen = [counts()]
decoder = FfcvDecoder(open_store({str(tmp_path / "x.beton")!r}), barlow_twins(24), 2)
seen.append(counts())
whole = np.array([[[0, 0, 41, 30]]] * 2, np.float32)
stream = decoder.stream((np.array([i]), whole) for i in range(9))
next(stream)
seen.append(counts())
stream.close()
print(seen + [counts()])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "[[3, 3], [3, 3], [3, 3], [3, 3]]", ran.stderr


# Files that cannot be used


def test_stores_other_than_betons_are_refused_with_the_remedy(photos: Path) -> None:
    for store in (open_store(photos), FixedSizeStore([]), Subset(open_store(photos), np.arange(3))):
        with pytest.raises(
            ValueError, match=r"ffcv reads only \.beton files: create one with convert\.py"
        ):
            decoder_of("ffcv", store, RECIPE)


def test_changed_or_truncated_beton_is_refused_before_ffcv_reads_it(
    tmp_path: Path, forty: Store
) -> None:
    decoder = decoder_of("ffcv", forty, RECIPE)
    path = tmp_path / "x.beton"
    whole = path.read_bytes()
    table = struct.unpack_from("<Q", whole, TABLE_OFFSET)[0]
    image_address = HEADER_BYTES + 2 * FIELD_BYTES + 5
    for at in (image_address, table + 8, table + 16):  # and the address and size of its allocation
        data = bytearray(whole)
        struct.pack_into("<Q", data, at, 2**40)
        path.write_bytes(data)
        with pytest.raises(
            ValueError,
            match=r"x\.beton: FFCV and twinfeed find the images at .*just changed",
        ):
            decoder_of("ffcv", forty, RECIPE)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"x\.beton has changed while it was being read"):
        list(decoder.stream([whole_images([0])]))


def test_auto_does_not_choose_ffcv(forty: Store) -> None:
    assert decoder_of("auto", forty, RECIPE).name == "cpu"
    assert decoder_of("ffcv", forty, RECIPE).reason == "as requested"
