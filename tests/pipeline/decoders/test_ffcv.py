"""The decoder ffcv: what FFCV has read, decoded and cropped as by torchvision's, to the bit; and what it leaves."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
import time
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
from pipeline.decoders import open_decoder
from pipeline.recipe import Recipe, crop_view, draw, whole_view
from tests.helpers.images import encoded, picture
from tests.helpers.libraries import import_or_skip
from tests.helpers.stores import decoder_of
from tests.pipeline.decoders.test_decoders import Memory, resident_mb, whole_images
from tests.pipeline.formats.test_beton import (
    FIELD,
    FINALIZER,
    FORKS,
    HEADER,
    TABLE,
    ffcv_writes,
    write,
)
from tests.pipeline.test_images import BAD, FORMATS, by_pillow, difference

pytestmark = [FINALIZER, FORKS, pytest.mark.usefixtures("ffcv")]

ROOT = Path(__file__).parents[3]
SIZE, RECIPE, CPU = 24, barlow_twins(24), torch.device("cpu")


def beton_of(path: Path, images: list[bytes]) -> Store:
    return open_store(
        write(path / "x.beton", [(data, i % 3) for i, data in enumerate(images)], size=(41, 30))
    )


@pytest.fixture
def forty(tmp_path: Path) -> Store:
    return beton_of(tmp_path, [encoded(picture(41, 30, seed=i)) for i in range(40)])


def drawn(store: Store, recipe: Recipe, batch: int = 7) -> list[Any]:
    """Plans for all samples in turn."""
    parts = np.array_split(np.arange(len(store)), -(-len(store) // batch))
    return [
        (p, draw(recipe, 0, 0, p, store.index["height"][p], store.index["width"][p]).boxes)
        for p in parts
    ]


def assert_as_torchvisions(store: Store, plan: list[Any], recipe: Recipe = RECIPE) -> np.ndarray:
    """To the bit; returns which samples were good."""
    ffcvs, others = (
        list(decoder_of(name, store, recipe).stream(iter(plan))) for name in ("ffcv", "torchvision")
    )
    assert len(ffcvs) == len(others) == len(plan)
    for (crops, good), (other_crops, other_good) in zip(ffcvs, others, strict=True):
        assert np.array_equal(good, other_good)
        assert torch.equal(crops[:, good], other_crops[:, good])
    return np.concatenate([good for _, good in ffcvs])


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_format_gives_pillows_crops(tmp_path: Path) -> None:
    store = beton_of(tmp_path, list(FORMATS.values()))
    for recipe in (RECIPE, crop_view(SIZE), whole_view(SIZE)):
        assert assert_as_torchvisions(store, drawn(store, recipe), recipe).all()
    ((crops, good),) = decoder_of("ffcv", store, RECIPE).stream([whole_images(range(len(store)))])
    assert good.all()
    for i, (name, data) in enumerate(FORMATS.items()):
        expected = by_pillow(data).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert all(difference(crops[view, i], expected) <= 0.5 for view in range(2)), name


def test_what_ffcv_wrote_raw_and_as_jpeg_is_decoded_alike(tmp_path: Path) -> None:
    from ffcv.fields import BytesField, IntField, RGBImageField

    pixels = [np.asarray(picture(60 + i, 50 + 2 * i, seed=i)) for i in range(16)]
    fields = {
        "text": BytesField(),
        "label": IntField(),
        "image": RGBImageField("smart", smart_threshold=3 * 70 * 70),
        "other": RGBImageField("raw"),
    }
    texts, small = (
        [np.arange(i + 1, dtype=np.uint8) for i in range(16)],
        [np.zeros((2, 2, 3), np.uint8)] * 16,
    )
    path = ffcv_writes(tmp_path / "x.beton", fields, [texts, list(range(16)), pixels, small])
    store = open_store(path)
    assert {data[:2] for data in store.read_batch(np.arange(16))} == {b"P6", b"\xff\xd8"}
    plan = drawn(store, center_view(32))
    assert assert_as_torchvisions(store, plan, center_view(32)).all()
    assert assert_as_torchvisions(store, drawn(store, RECIPE)).all()


def test_bad_images_are_found_and_the_others_unaffected(tmp_path: Path) -> None:
    bad = [data for name, (data, _) in BAD.items() if name != "nothing" and "bomb" not in name]
    images = [encoded(picture(41, 30, seed=i)) for i in range(24)]
    unharmed = list(
        decoder_of("ffcv", beton_of(tmp_path, images), RECIPE).stream([whole_images(range(24))])
    )
    places = np.random.default_rng(0).permutation(24)[: len(bad)]
    for place, data in zip(places, bad, strict=True):
        images[place] = data
    (tmp_path / "bad").mkdir()
    store = beton_of(tmp_path / "bad", images)
    good = assert_as_torchvisions(store, [whole_images(range(24))])
    assert sorted(np.flatnonzero(~good)) == sorted(places)
    ((crops, _),) = decoder_of("ffcv", store, RECIPE).stream([whole_images(range(24))])
    assert torch.equal(crops[:, good], unharmed[0][0][:, good])


def test_a_loader_is_that_of_torchvision_over_two_epochs(tmp_path: Path) -> None:
    """On parts of a part of a beton, with bad images that are replaced, in batches without and with a rest."""
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
            for name in ("ffcv", "torchvision")
        ]
        for a, b in zip(*(loader.steps(0, 2 * len(loader)) for loader in loaders), strict=True):
            assert torch.equal(a.samples, b.samples)
            assert torch.equal(a.labels, b.labels)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert loaders[0].bad == loaders[1].bad
    assert loaders[0].decoder.name == "ffcv"


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_may_have_any_size_and_are_the_callers_own(forty: Store) -> None:
    groups = [range(3), range(3, 5), range(5, 25), range(25, 26), range(0), range(26, 40), range(0)]
    decoder = decoder_of("ffcv", forty, RECIPE)
    ((whole, _),) = decoder.stream([whole_images(range(40))])
    streamed = list(decoder.stream(map(whole_images, groups)))
    assert (
        [crops.shape[1] for crops, _ in streamed]
        == [len(good) for _, good in streamed]
        == list(map(len, groups))
    )
    for group, (crops, good) in zip(groups, streamed, strict=True):
        assert good.all()
        assert torch.equal(crops, whole[:, list(group)])
    assert list(decoder.stream([])) == []


def test_a_plan_may_be_endless_and_is_asked_for_a_few_batches_ahead(forty: Store) -> None:
    asked = 0

    def plan() -> Iterator[Any]:
        nonlocal asked
        while True:
            asked += 1
            yield whole_images([asked % 40])

    stream = decoder_of("ffcv", forty, RECIPE).stream(plan())
    for done in range(1, 50):
        next(stream)
        assert done < asked <= done + 6
    stream.close()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_many_streams_leave_no_thread_file_or_memory(tmp_path: Path) -> None:
    images = [encoded(picture(500, 400, seed=i)) for i in range(24)]
    store = open_store(write(tmp_path / "x.beton", [(data, 0) for data in images], size=(500, 400)))
    decoder = decoder_of("ffcv", store, barlow_twins(96))

    def use(times: int) -> tuple[int, int, float]:
        for i in range(times):
            stream = decoder.stream(whole_images(range(k, k + 6), 500, 400) for k in (0, 6, 12, 18))
            for _ in range(i % 5):  # closed before the first batch, in between, or at the end
                next(stream)
            stream.close()
        gc.collect()
        time.sleep(0.2)  # a thread that has ended is still listed for a moment
        return (
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
            resident_mb(),
        )

    use(10)
    threads, files, memory = use(5)
    threads_later, files_later, memory_later = use(20)
    assert threads_later <= threads
    assert files_later <= files
    assert memory_later - memory < 20


def test_errors_of_the_plan_and_of_ffcvs_thread_are_raised(
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
def test_torchs_number_of_threads_is_left_alone(tmp_path: Path) -> None:
    """That of this thread, and of those to come; in a process that has not imported FFCV yet."""
    code = f"""
import threading, warnings
import numpy as np, torch
from pipeline import barlow_twins, open_store

def counts():
    found = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found

warnings.simplefilter("ignore")
torch.set_num_threads(3)
from pipeline.decoders.ffcv import FfcvDecoder
said = [counts()]
decoder = FfcvDecoder(open_store({str(tmp_path / "x.beton")!r}), barlow_twins(24), 2)
said.append(counts())
whole = np.array([[[0, 0, 41, 30]]] * 2, np.float32)
stream = decoder.stream((np.array([i]), whole) for i in range(9))
next(stream)
said.append(counts())
stream.close()
print(said + [counts()])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "[[3, 3], [3, 3], [3, 3], [3, 3]]", ran.stderr


# ── what cannot be used ──────────────────────────────────────────────────────────────────────────────────────────────


def test_stores_that_are_no_betons_are_refused_with_the_remedy(photos: Path) -> None:
    for store in (open_store(photos), Memory([]), Subset(open_store(photos), np.arange(3))):
        with pytest.raises(ValueError, match=r"ffcv reads betons alone: make one with convert\.py"):
            decoder_of("ffcv", store, RECIPE)


def test_a_beton_that_is_exchanged_or_cut_is_refused_before_ffcv_reads_it(
    tmp_path: Path, forty: Store
) -> None:
    decoder, path = decoder_of("ffcv", forty, RECIPE), tmp_path / "x.beton"
    whole = path.read_bytes()
    table = struct.unpack_from("<Q", whole, TABLE)[0]
    for at in (
        HEADER + 2 * FIELD + 5,
        table + 8,
        table + 16,
    ):  # the address of an image, its allocation's, the size
        data = bytearray(whole)
        struct.pack_into("<Q", data, at, 2**40)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.beton has changed, or FFCV misreads it"):
            decoder_of("ffcv", forty, RECIPE)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"x\.beton has changed while it was being read"):
        list(decoder.stream([whole_images([0])]))


def test_auto_leaves_it_to_the_user(forty: Store) -> None:
    assert open_decoder("auto", forty, RECIPE, 2, CPU, 0.65).name == "torchvision"
    assert open_decoder("ffcv", forty, RECIPE, 2, CPU, 0.65).why == "as asked"


def test_asked_for_and_not_installed_it_says_how_to_get_it(
    forty: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_or_skip("pipeline.decoders.ffcv")
    monkeypatch.setitem(sys.modules, "pipeline.decoders.ffcv", None)
    with pytest.raises(
        ValueError, match=r"FFCV cannot be imported.*apt-get install lib.*uv sync --extra ffcv"
    ) as error:
        open_decoder("ffcv", forty, RECIPE, 2, CPU, 0.65)
    assert "\n" not in str(error.value)
