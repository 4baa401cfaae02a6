"""The decoder `dali`, on the CPU: pixels, bad images, batches that DALI refuses, streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import (
    Batch,
    LoaderOptions,
    Recipe,
    barlow_twins,
    center_view,
    open_loader,
    open_store,
    whole_view,
)
from pipeline.decoders import Boxes
from pipeline.images import decode
from pipeline.order import Samples
from tests.helpers.images import (
    BAD_IMAGES,
    EXAMPLE_IMAGES,
    decoded_by_pillow,
    encoded,
    mean_difference,
    picture,
    random_box,
)
from tests.helpers.jpegs import ALL_IMAGES, ORDINARY_JPEGS, damaged_headers, refused_jpeg
from tests.helpers.resources import NEEDS_PROC, resources_in_use
from tests.helpers.stores import FixedSizeStore, decoder_of, whole_images

dali = pytest.importorskip(
    "pipeline.decoders.dali", reason="needs nvidia-dali", exc_type=ImportError
)

SIZE = 24
RECIPE = barlow_twins(SIZE)


def crops_of(images: list[bytes], recipe: Recipe = RECIPE) -> tuple[Tensor, Any]:
    """The crops of whole images, and which are good."""
    decoder = decoder_of("dali", FixedSizeStore(images), recipe)
    ((crops, good),) = decoder.stream([whole_images(range(len(images)))])
    return crops, good


def resized(data: bytes) -> Image.Image:
    return decoded_by_pillow(data).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.fixture
def nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if DALI refuses an image that it has been given."""
    monkeypatch.setattr(
        dali.DaliDecoder, "decode_refused", lambda *_: pytest.fail("DALI refused a batch")
    )


# Bounds in levels. Of black and white dots, Pillow clips the overshoots between its two passes, and
# DALI only after both.
BOUNDS = {"png 1 bit": 1.5}


# Pixels


@pytest.mark.usefixtures("nothing_refused")
def test_crops_of_every_format_are_those_of_pillow() -> None:
    crops, good = crops_of(list(ALL_IMAGES.values()))
    assert good.all()
    for i, (name, data) in enumerate(ALL_IMAGES.items()):
        for view in range(2):
            assert mean_difference(crops[view, i], resized(data)) <= BOUNDS.get(name, 0.5), name


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.parametrize("name", ALL_IMAGES)
def test_pixels_are_bit_identical_to_those_of_pillow(name: str) -> None:
    """Crops of the size of the images, so that nothing is resampled."""
    recipe = barlow_twins(30)
    boxes = np.tile(np.array([5, 0, 35, 30], np.float32), (2, 1, 1))
    ((crops, _),) = decoder_of("dali", FixedSizeStore([ALL_IMAGES[name]]), recipe).stream(
        [(np.array([0]), boxes)]
    )
    assert np.array_equal(crops[0, 0], decode(ALL_IMAGES[name], 30, 41).permute(1, 2, 0)[:, 5:35])


def test_ordinary_jpegs_are_decoded_by_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "decode", lambda *_: pytest.fail("decoded before DALI got it"))
    _, good = crops_of(list(ORDINARY_JPEGS.values()))
    assert good.all()


def test_a_thousand_crops_are_those_of_pillow() -> None:
    rng = np.random.default_rng(0)
    images = [encoded(picture(200, 150, seed=i), quality=80) for i in range(50)]
    plan = []
    for kind in range(10):
        boxes = np.array(
            [[random_box(rng, 200, 150, kind) for _ in images] for _ in range(2)], dtype=np.float32
        )
        plan.append((np.arange(50), boxes))
    differences = []
    for (_, boxes), (crops, good) in zip(
        plan, decoder_of("dali", FixedSizeStore(images, 150, 200), RECIPE).stream(plan), strict=True
    ):
        assert good.all()
        for view in range(2):
            for i, data in enumerate(images):
                inside = decoded_by_pillow(data).crop(tuple(boxes[view, i].astype(int).tolist()))
                differences.append(
                    mean_difference(
                        crops[view, i], inside.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                    )
                )
    assert len(differences) == 1000
    assert max(differences) <= 0.5


def test_each_view_has_its_own_box() -> None:
    boxes = np.array([[[0, 0, 20, 30]], [[21, 0, 41, 30]]], dtype=np.float32)
    ((crops, _),) = decoder_of("dali", FixedSizeStore([EXAMPLE_IMAGES["png"]]), RECIPE).stream(
        [(np.array([0]), boxes)]
    )
    for view in range(2):
        inside = decoded_by_pillow(EXAMPLE_IMAGES["png"]).crop(
            tuple(boxes[view, 0].astype(int).tolist())
        )
        assert (
            mean_difference(crops[view, 0], inside.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            <= 0.5
        )


# Bad images


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_found_before_dali_gets_them() -> None:
    """In batches of 64, where headers that DALI refuses would end this process."""
    bad = [data for data, _ in BAD_IMAGES.values()] + list(damaged_headers().values())
    bad += [b"P6\n41 30\n255\n" + bytes(3 * 41 * 29), b"P6\n9 9\n255\n"]
    images = [EXAMPLE_IMAGES["jpeg"]] * 64
    places = np.random.default_rng(0).permutation(64)[: len(bad)]
    for place, data in zip(places, bad, strict=True):
        images[place] = data
    crops, good = crops_of(images)
    assert sorted(np.flatnonzero(~good)) == sorted(places)
    for i in np.flatnonzero(good):
        assert mean_difference(crops[0, i], resized(images[i])) <= 0.5


def test_random_damage_to_headers_is_found_and_does_not_kill_the_process() -> None:
    rng = np.random.default_rng(0)
    images = []
    for i in range(1000):
        data = bytearray(EXAMPLE_IMAGES["rotated jpeg" if i % 2 else "progressive jpeg"])
        if i % 3:
            for at in rng.integers(2, data.index(b"\xff\xda") + 12, rng.integers(1, 4)):
                data[at] = rng.integers(256)
        images.append(bytes(data))
    store = FixedSizeStore(images)
    plan = [whole_images(range(first, first + 100)) for first in range(0, 1000, 100)]
    good = {}
    for name in ("dali", "cpu"):
        stream = decoder_of(name, store, RECIPE).stream(plan)
        good[name] = np.concatenate([good_of_batch for _, good_of_batch in stream])
    assert 100 < np.count_nonzero(~good["cpu"]) < 600
    assert np.array_equal(good["dali"], good["cpu"])


def test_bad_images_do_not_affect_the_others_of_their_batch() -> None:
    images = [
        EXAMPLE_IMAGES["jpeg"],
        EXAMPLE_IMAGES["jpeg"][:90],
        refused_jpeg(),
        EXAMPLE_IMAGES["png"],
    ]
    boxes = np.tile(np.array([0, 0, 35, 26], np.float32), (1, 4, 1))
    ((crops, good),) = decoder_of("dali", FixedSizeStore(images), whole_view(SIZE)).stream(
        [(np.arange(4), boxes)]
    )
    assert good.tolist() == [True, False, False, True]
    for i in (0, 3):
        expected = decoded_by_pillow(images[i]).resize((35, 26), Image.Resampling.BILINEAR)
        assert (
            mean_difference(crops[0, i], expected.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            <= 0.5
        )


@pytest.mark.parametrize("refused", [[0], [3, 17], [0, 1, 2, 8, 16, 39]], ids=str)
def test_refused_batch_is_run_again_without_the_bad_images(
    refused: list[int],
) -> None:
    images = [encoded(picture(41, 30, seed=i)) for i in range(40)]
    store = FixedSizeStore(list(images))
    plan = [whole_images(range(first, min(first + 7, 40))) for first in range(0, 40, 7)]
    without_bad = list(decoder_of("dali", store, RECIPE).stream(plan))
    for i in refused:
        store.images[i] = refused_jpeg(i)
    with_bad = list(decoder_of("dali", store, RECIPE).stream(plan))
    assert len(with_bad) == len(plan)
    for (samples, _), (before, _), (crops, good) in zip(plan, without_bad, with_bad, strict=True):
        assert np.array_equal(samples[~good], np.intersect1d(samples, refused))
        assert torch.equal(crops[:, good], before[:, good])


def test_images_that_only_dali_refuses_are_decoded_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [encoded(picture(41, 30, seed=i)) for i in range(8)]
    usual, _ = crops_of(images)
    refused = refused_jpeg()
    monkeypatch.setattr(
        dali, "decode", lambda data, h, w: decode(images[3] if data == refused else data, h, w)
    )
    crops, good = crops_of([*images[:3], refused, *images[4:]])
    assert good.all()
    assert torch.equal(crops, usual)


def test_errors_without_a_bad_image_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("CUDA allocation failed")

    monkeypatch.setattr(dali.Pipeline, "outputs", out_of_memory)
    with pytest.raises(RuntimeError, match="allocation failed"):
        crops_of([EXAMPLE_IMAGES["jpeg"]] * 3)


# Streams


def test_batches_are_not_overwritten_later() -> None:
    """They stay as they were, whatever is decoded later, and may be written to."""
    images = [encoded(picture(41, 30, seed=i)) for i in range(60)]
    stream = decoder_of("dali", FixedSizeStore(images), RECIPE).stream(
        whole_images(range(i, i + 4)) for i in range(0, 60, 4)
    )
    kept, copies = [], []
    for crops, _ in stream:
        crops[0, 1] = 77
        kept.append(crops)
        copies.append(crops.clone())
    assert all(torch.equal(crops, copy) for crops, copy in zip(kept, copies, strict=True))
    assert all((crops[0, 1] == 77).all() and not (crops[1, 1] == 77).all() for crops in kept)


def test_batches_may_have_any_size() -> None:
    images = [encoded(picture(41, 30, seed=i)) for i in range(50)]
    groups = [range(3), range(3, 5), range(5, 25), range(25, 26), range(0), range(26, 50), range(0)]
    whole, _ = crops_of(images)
    streamed = list(
        decoder_of("dali", FixedSizeStore(images), RECIPE).stream(map(whole_images, groups))
    )
    assert [crops.shape[1] for crops, _ in streamed] == [len(group) for group in groups]
    assert [len(good) for _, good in streamed] == [len(group) for group in groups]
    for group, (crops, good) in zip(groups, streamed, strict=True):
        assert good.all()
        assert torch.equal(crops, whole[:, list(group)])


def test_stream_takes_only_a_few_batches_ahead_from_the_plan() -> None:
    taken: list[int] = []

    def plan() -> Iterator[tuple[Samples, Boxes]]:
        for i in range(20):
            taken.append(i)
            yield whole_images([i])

    stream = decoder_of("dali", FixedSizeStore([EXAMPLE_IMAGES["jpeg"]] * 20), RECIPE).stream(
        plan()
    )
    next(stream)
    assert 3 <= len(taken) <= 5
    stream.close()


def test_batches_do_not_depend_on_the_number_of_threads(photos: Path) -> None:
    store = open_store(photos)

    def batches(threads: int, first: int) -> list[Batch]:
        options = LoaderOptions(batch_size=14, decoder="dali", threads=threads, seed=3)
        return list(open_loader(store, RECIPE, options).steps(first, 8))

    reference = batches(threads=1, first=1)
    for run in (batches(2, 1), batches(5, 1), batches(3, 5)):
        for a, b in zip(reference[-len(run) :], run, strict=True):
            assert torch.equal(a.samples, b.samples)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_batches_are_near_those_of_the_cpu_decoder(photos: Path) -> None:
    store = open_store(photos)
    for recipe, shuffle in ((barlow_twins(48), True), (center_view(32), False)):
        batches = {}
        for name in ("dali", "cpu"):
            options = LoaderOptions(batch_size=14, decoder=name, threads=2, shuffle=shuffle)
            batches[name] = open_loader(store, recipe, options).epoch(1)
        for a, b in zip(batches["dali"], batches["cpu"], strict=True):
            assert torch.equal(a.samples, b.samples)
            for x, y in zip(a.views, b.views, strict=True):
                assert float((x - y).abs().mean()) < 0.5 / 255 / 0.22  # half a level


@NEEDS_PROC
def test_many_streams_leave_no_thread_file_or_memory_behind() -> None:
    images = [encoded(picture(200, 150, seed=i)) for i in range(24)]
    images[13] = refused_jpeg()
    decoder = decoder_of("dali", FixedSizeStore(images, 150, 200), RECIPE)
    decoder.store.index["height"][13] = 30
    decoder.store.index["width"][13] = 41

    def open_streams(count: int) -> None:
        for i in range(count):
            stream = decoder.stream(whole_images(range(k, k + 6)) for k in (0, 6, 12, 18))
            # Closed before the first batch, after the error, in between, or at the end.
            for _ in range(i % 5):
                next(stream)
            stream.close()

    open_streams(30)
    before = resources_in_use()
    open_streams(40)
    after = resources_in_use()
    assert after.threads <= before.threads
    assert after.files <= before.files
    assert after.memory_mb - before.memory_mb < 20
