"""DALI on the CPU: what it is fed, what it does with what it refuses, and what it leaves behind."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import (
    LoaderOptions,
    Recipe,
    barlow_twins,
    center_view,
    open_loader,
    open_store,
    whole_view,
)
from pipeline.decoders import Boxes, open_decoder
from pipeline.images import decode
from pipeline.order import Samples
from pipeline.stores import Store
from tests.helpers.images import encoded, picture
from tests.helpers.stores import decoder_of
from tests.pipeline.test_images import BAD, FORMATS, by_pillow, difference, png, some_box

dali = pytest.importorskip(
    "pipeline.decoders.dali", reason="needs nvidia-dali", exc_type=ImportError
)

SIZE = 24
RECIPE = barlow_twins(SIZE)
CPU = torch.device("cpu")


class Memory(Store):
    """Images in memory, all of which the index says to be of one size."""

    def __init__(self, images: list[bytes], height: int = 30, width: int = 41) -> None:
        self.images, self.classes, self.rejects = images, [], {}
        self.index = np.zeros(
            len(images), dtype=[("label", "i4"), ("height", "i4"), ("width", "i4")]
        )
        self.index["height"], self.index["width"] = height, width

    def __len__(self) -> int:
        return len(self.images)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self.images[sample] for sample in samples]

    def name(self, sample: int) -> str:
        return f"image {sample}"


def whole_images(samples: Any, width: int = 41, height: int = 30) -> tuple[Samples, Boxes]:
    return np.array(samples, dtype=np.int64), np.tile(
        np.array([0, 0, width, height], np.float32), (2, len(samples), 1)
    )


def crops_of(images: list[bytes], recipe: Recipe = RECIPE) -> tuple[Tensor, Any]:
    ((crops, good),) = decoder_of("dali", Memory(images), recipe).stream(
        [whole_images(range(len(images)))]
    )
    return crops, good


def resized(data: bytes) -> Image.Image:
    return by_pillow(data).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def refused_jpeg(seed: int = 0) -> bytes:
    """A whole header, but Huffman tables that no code has: no decoder takes it, and DALI fails the whole batch."""
    data = bytearray(encoded(picture(41, 30, seed)))
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    return bytes(data)


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def adobe_rgb_jpeg() -> bytes:
    return encoded(picture(41, 30), keep_rgb=True, quality=95)


def unnamed_rgb_jpeg() -> bytes:
    """RGB by its Adobe segment alone: its components are numbered as those of YCbCr are."""
    data = bytearray(adobe_rgb_jpeg())
    for name, number in zip(b"RGB", (1, 2, 3), strict=True):
        for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
            at = data.index(marker) + first + (number - 1) * step
            assert data[at] == name
            data[at] = number
    return bytes(data)


def cmyk_jpeg_without_adobe() -> bytes:
    data = FORMATS["cmyk jpeg"]
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 16 :]


def upside_down_jpeg() -> bytes:
    """Rotated by its EXIF, and of the same size if that were obeyed."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(picture(41, 30), exif=exif)


def padded_jpeg() -> bytes:
    return FORMATS["jpeg"] + bytes(5000)


def sixteen_bit_png() -> bytes:
    levels = np.random.default_rng(0).integers(0, 65536, (30, 41, 3), dtype=np.uint16)
    return png(41, 30, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels), depth=16)


ORDINARY = {name: data for name, data in FORMATS.items() if "jpeg" in name and name != "cmyk jpeg"}
ORDINARY["upside-down jpeg"] = upside_down_jpeg()
ORDINARY["slightly padded jpeg"] = FORMATS["jpeg"] + bytes(512)
OTHERS = {
    "rgb jpeg": adobe_rgb_jpeg(),
    "unnamed rgb jpeg": unnamed_rgb_jpeg(),
    "padded jpeg": padded_jpeg(),
}
OTHERS |= {"cmyk jpeg without adobe": cmyk_jpeg_without_adobe(), "16-bit png": sixteen_bit_png()}
ALL = {**FORMATS, **ORDINARY, **OTHERS}
BOUNDS = {
    "png 1 bit": 1.5
}  # black and white dots: Pillow clips what overshoots between its two passes, DALI after both


@pytest.fixture
def nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali.DaliDecoder, "_mend", lambda *_: pytest.fail("DALI refused a batch"))


@pytest.mark.usefixtures("nothing_refused")
def test_every_format_gives_pillows_crops() -> None:
    crops, good = crops_of(list(ALL.values()))
    assert good.all()
    for i, (name, data) in enumerate(ALL.items()):
        for view in range(2):
            assert difference(crops[view, i], resized(data)) <= BOUNDS.get(name, 0.5), name


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.parametrize("name", ALL)
def test_pixels_are_bit_identical_to_pillows(name: str) -> None:
    """Crops of the size of the images, so that nothing is resampled."""
    recipe = barlow_twins(30)
    boxes = np.tile(np.array([5, 0, 35, 30], np.float32), (2, 1, 1))
    ((crops, _),) = decoder_of("dali", Memory([ALL[name]]), recipe).stream([(np.array([0]), boxes)])
    assert np.array_equal(crops[0, 0], decode(ALL[name], 30, 41).permute(1, 2, 0)[:, 5:35])


@pytest.mark.parametrize("name", ALL)
def test_dali_gets_ordinary_jpegs_as_they_are_and_pixels_of_all_else(name: str) -> None:
    (fed,) = decoder_of("dali", Memory([ALL[name]]), RECIPE)._encoded(np.array([0]))
    if name in ORDINARY:
        assert fed == ALL[name]
    else:
        assert fed.startswith(b"P6\n41 30\n255\n")


def test_a_thousand_boxes_are_pillows_crop_then_resize() -> None:
    rng = np.random.default_rng(0)
    images = [encoded(picture(200, 150, seed=i), quality=80) for i in range(50)]
    plan = []
    for kind in range(10):
        boxes = np.array(
            [[some_box(rng, 200, 150, kind) for _ in images] for _ in range(2)], dtype=np.float32
        )
        plan.append((np.arange(50), boxes))
    differences = []
    for (_, boxes), (crops, good) in zip(
        plan, decoder_of("dali", Memory(images, 150, 200), RECIPE).stream(plan), strict=True
    ):
        assert good.all()
        for view in range(2):
            for i, data in enumerate(images):
                inside = by_pillow(data).crop(tuple(boxes[view, i].astype(int).tolist()))
                differences.append(
                    difference(
                        crops[view, i], inside.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                    )
                )
    assert len(differences) == 1000
    assert max(differences) <= 0.5


def test_each_view_has_its_own_box() -> None:
    boxes = np.array([[[0, 0, 20, 30]], [[21, 0, 41, 30]]], dtype=np.float32)
    ((crops, _),) = decoder_of("dali", Memory([FORMATS["png"]]), RECIPE).stream(
        [(np.array([0]), boxes)]
    )
    for view in range(2):
        inside = by_pillow(FORMATS["png"]).crop(tuple(boxes[view, 0].astype(int).tolist()))
        assert (
            difference(crops[view, 0], inside.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) <= 0.5
        )


# ── bad images ───────────────────────────────────────────────────────────────────────────────────────────────────────


def crashing_jpegs() -> dict[str, bytes]:
    """What kills the process where DALI's own parser meets it in a large batch."""
    data = FORMATS["jpeg"]
    frame = data.index(b"\xff\xc0")
    return {
        "a broken segment": data[:20] + bytes(30) + data[50:],
        "a segment beyond the end": data[:frame] + b"\xff\xe2\xff\xff" + data[frame:],
        "twelve bits": data[: frame + 4] + b"\x0c" + data[frame + 5 :],
        "five components": data[: frame + 9] + b"\x05" + data[frame + 10 :],
        "lossless": data[: frame + 1] + b"\xc3" + data[frame + 2 :],
        "no scan": data[: data.index(b"\xff\xda")] + b"\xff\xd9",
    }


@pytest.mark.usefixtures("nothing_refused")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_found_before_dali_sees_them() -> None:
    """In batches of 64, where headers that DALI refuses would end this process."""
    bad = [data for data, _ in BAD.values()] + list(crashing_jpegs().values())
    bad += [b"P6\n41 30\n255\n" + bytes(3 * 41 * 29), b"P6\n9 9\n255\n"]
    images = [FORMATS["jpeg"]] * 64
    places = np.random.default_rng(0).permutation(64)[: len(bad)]
    for place, data in zip(places, bad, strict=True):
        images[place] = data
    crops, good = crops_of(images)
    assert sorted(np.flatnonzero(~good)) == sorted(places)
    for i in np.flatnonzero(good):
        assert difference(crops[0, i], resized(images[i])) <= 0.5


def test_headers_with_random_damage_neither_end_the_process_nor_pass() -> None:
    rng = np.random.default_rng(0)
    images = []
    for i in range(1000):
        data = bytearray(FORMATS["rotated jpeg" if i % 2 else "progressive jpeg"])
        if i % 3:
            for at in rng.integers(2, data.index(b"\xff\xda") + 12, rng.integers(1, 4)):
                data[at] = rng.integers(256)
        images.append(bytes(data))
    store = Memory(images)
    plan = [whole_images(range(first, first + 100)) for first in range(0, 1000, 100)]
    dalis, torchvisions = (
        np.concatenate([good for _, good in decoder_of(name, store, RECIPE).stream(plan)])
        for name in ("dali", "torchvision")
    )
    assert 100 < np.count_nonzero(~torchvisions) < 600
    assert np.array_equal(dalis, torchvisions)


def test_bad_images_among_whole_ones_are_left_out() -> None:
    images = [FORMATS["jpeg"], FORMATS["jpeg"][:90], refused_jpeg(), FORMATS["png"]]
    boxes = np.tile(np.array([0, 0, 35, 26], np.float32), (1, 4, 1))
    ((crops, good),) = decoder_of("dali", Memory(images), whole_view(SIZE)).stream(
        [(np.arange(4), boxes)]
    )
    assert good.tolist() == [True, False, False, True]
    for i in (0, 3):
        expected = by_pillow(images[i]).resize((35, 26), Image.Resampling.BILINEAR)
        assert (
            difference(crops[0, i], expected.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) <= 0.5
        )


@pytest.mark.parametrize("refused", [[0], [3, 17], [0, 1, 2, 8, 16, 39]], ids=str)
def test_a_batch_that_dali_refuses_is_mended_and_those_after_it_are_in_their_places(
    refused: list[int],
) -> None:
    images = [encoded(picture(41, 30, seed=i)) for i in range(40)]
    store, plan = (
        Memory(list(images)),
        [whole_images(range(first, min(first + 7, 40))) for first in range(0, 40, 7)],
    )
    unharmed = list(decoder_of("dali", store, RECIPE).stream(plan))
    for i in refused:
        store.images[i] = refused_jpeg(i)
    mended = list(decoder_of("dali", store, RECIPE).stream(plan))
    assert len(mended) == len(plan)
    for (samples, _), (before, _), (crops, good) in zip(plan, unharmed, mended, strict=True):
        assert np.array_equal(samples[~good], np.intersect1d(samples, refused))
        assert torch.equal(crops[:, good], before[:, good]), (
            "to the bit, as if nothing had happened"
        )


def test_what_only_dali_refuses_is_given_to_it_as_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(picture(41, 30, seed=i)) for i in range(8)]
    usual, _ = crops_of(images)
    refused = refused_jpeg()
    monkeypatch.setattr(
        dali, "decode", lambda data, h, w: decode(images[3] if data == refused else data, h, w)
    )
    crops, good = crops_of([*images[:3], refused, *images[4:]])
    assert good.all()
    assert torch.equal(crops, usual)


def test_an_error_that_no_image_explains_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("CUDA allocation failed")

    monkeypatch.setattr(dali.Pipeline, "outputs", out_of_memory)
    with pytest.raises(RuntimeError, match="allocation failed"):
        crops_of([FORMATS["jpeg"]] * 3)


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_are_the_callers_own() -> None:
    """They stay as they were, whatever is decoded later, and may be written to."""
    images = [encoded(picture(41, 30, seed=i)) for i in range(60)]
    stream = decoder_of("dali", Memory(images), RECIPE).stream(
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
    streamed = list(decoder_of("dali", Memory(images), RECIPE).stream(map(whole_images, groups)))
    assert (
        [crops.shape[1] for crops, _ in streamed]
        == [len(good) for _, good in streamed]
        == list(map(len, groups))
    )
    for group, (crops, good) in zip(groups, streamed, strict=True):
        assert good.all()
        assert torch.equal(crops, whole[:, list(group)])


def test_the_plan_is_asked_for_a_few_batches_ahead() -> None:
    asked: list[int] = []

    def plan() -> Iterator[tuple[Samples, Boxes]]:
        for i in range(20):
            asked.append(i)
            yield whole_images([i])

    stream = decoder_of("dali", Memory([FORMATS["jpeg"]] * 20), RECIPE).stream(plan())
    next(stream)
    assert 3 <= len(asked) <= 5
    stream.close()


def test_threads_decide_nothing(photos: Path) -> None:
    store = open_store(photos)
    runs = [
        list(
            open_loader(
                store, RECIPE, LoaderOptions(batch_size=14, decoder="dali", threads=n, seed=3)
            ).steps(1, 8)
        )
        for n in (1, 2, 5)
    ]
    resumed = list(
        open_loader(
            store, RECIPE, LoaderOptions(batch_size=14, decoder="dali", threads=3, seed=3)
        ).steps(5, 8)
    )
    for run in (*runs[1:], resumed):
        for a, b in zip(runs[0][-len(run) :], run, strict=True):
            assert torch.equal(a.samples, b.samples)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_batches_are_those_of_torchvision(photos: Path) -> None:
    store = open_store(photos)
    for recipe, shuffle in ((barlow_twins(48), True), (center_view(32), False)):
        dalis, others = (
            open_loader(
                store,
                recipe,
                LoaderOptions(batch_size=14, decoder=name, threads=2, shuffle=shuffle),
            ).epoch(1)
            for name in ("dali", "torchvision")
        )
        for a, b in zip(dalis, others, strict=True):
            assert torch.equal(a.samples, b.samples)
            for x, y in zip(a.views, b.views, strict=True):
                assert float((x - y).abs().mean()) < 0.5 / 255 / 0.22  # half a level


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_many_streams_leave_no_thread_file_or_memory() -> None:
    images = [encoded(picture(200, 150, seed=i)) for i in range(24)]
    images[13] = refused_jpeg()
    decoder = decoder_of("dali", Memory(images, 150, 200), RECIPE)
    decoder.store.index[13]["height"], decoder.store.index[13]["width"] = 30, 41

    def use(times: int) -> tuple[int, int, float]:
        for i in range(times):
            stream = decoder.stream(whole_images(range(k, k + 6), 41, 30) for k in (0, 6, 12, 18))
            for _ in range(
                i % 5
            ):  # closed before the first batch, after the error, in between, or at the end
                next(stream)
            stream.close()
        gc.collect()
        time.sleep(0.2)  # a thread that has ended is still listed for a moment
        return (
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
            resident_mb(),
        )

    use(20)
    threads, files, memory = use(10)
    threads_later, files_later, memory_later = use(40)
    assert threads_later <= threads
    assert files_later <= files
    assert memory_later - memory < 20


# ── which decoder ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "device", "installed", "name", "why"),
    [
        ("auto", "cpu", True, "torchvision", "no GPU"),
        ("auto", "cuda", True, "dali", "on a GPU"),
        ("auto", "cuda", False, "torchvision", "DALI cannot be imported: .*dali.*"),
        ("dali", "cpu", True, "dali", "as asked"),
        ("torchvision", "cuda", True, "torchvision", "as asked"),
    ],
)
def test_auto_takes_dali_on_a_gpu_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, installed: bool, name: str, why: str
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "pipeline.decoders.dali", None)
    decoder = open_decoder(asked, Memory([]), RECIPE, 2, torch.device(device), 0.65)
    assert decoder.name == name
    assert re.fullmatch(why, decoder.why)


def test_asked_for_and_not_installed_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.decoders.dali", None)
    with pytest.raises(
        ValueError, match=r"DALI cannot be imported.*pip install nvidia-dali-cuda130"
    ) as error:
        open_decoder("dali", Memory([]), RECIPE, 2, CPU, 0.65)
    assert "\n" not in str(error.value)
