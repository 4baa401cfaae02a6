"""Decoding and cropping, compared with Pillow (the reference) and torchvision's transforms."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from pipeline import FOR_ANY_STORE, open_store
from pipeline.draw import draw
from pipeline.images import (
    BadImage,
    crop_and_resize,
    decode,
    image_size,
    resize_region,
)
from pipeline.recipe import barlow_twins, center_view, crop_view, whole_view
from tests.helpers.images import (
    BAD_IMAGES,
    EXAMPLE_IMAGES,
    decoded_by_pillow,
    encoded,
    mean_difference,
    picture,
    png,
    random_box,
)
from tests.helpers.stores import decoder_of

# Crops


def test_crop_and_resize_is_that_of_pillow() -> None:
    """A thousand boxes in fifty JPEGs, including single pixels, lines and whole images."""
    rng = np.random.default_rng(0)
    differences = []
    for i in range(50):
        width, height = (32, 32) if i % 10 == 0 else map(int, rng.integers(32, 400, 2))
        data = encoded(picture(width, height, seed=i), quality=80)
        pixels = decode(data, height, width)
        image = decoded_by_pillow(data)
        for kind in range(20):
            box = random_box(rng, width, height, kind)
            size = (32, 96, 224)[kind % 3]
            ours = crop_and_resize(pixels, np.array(box, dtype=np.float32), size, "bicubic")
            expected = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            differences.append(mean_difference(ours, expected))
    assert len(differences) == 1000
    assert max(differences) <= 0.5


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_decoders_stream_the_crops_of_pillow_in_the_order_of_the_plan(
    photos: Path, decoder: str
) -> None:
    store, recipe = open_store(photos), barlow_twins(48)
    plan = []
    for epoch, samples in enumerate(np.random.default_rng(1).permutation(60).reshape(5, 12)):
        rows = store.index[samples]
        plan.append((samples, draw(recipe, 0, epoch, samples, rows["height"], rows["width"]).boxes))
    streamed = list(decoder_of(decoder, store, recipe, threads=3).stream(iter(plan)))
    assert len(streamed) == len(plan)
    for (samples, boxes), (crops, good) in zip(plan, streamed, strict=True):
        assert good.all()
        for view in range(2):
            for i, sample in enumerate(samples):
                box = tuple(boxes[view, i].astype(int).tolist())
                reference = (
                    Image.open(store.name(int(sample)))
                    .crop(box)
                    .resize((48, 48), Image.Resampling.BICUBIC)
                )
                assert mean_difference(crops[view, i], reference) <= 0.5


@pytest.mark.parametrize(
    ("size", "resize"), [(224, None), (224, 224), (33, None), (32, 47), (32, 32)]
)
def test_center_view_is_resize_and_center_crop_of_torchvision(
    size: int, resize: int | None
) -> None:
    """Odd sizes, long and thin images, and images smaller than the side they are resized to."""
    recipe = center_view(size, resize)
    both = (transforms.Resize(resize or round(size * 256 / 224)), transforms.CenterCrop(size))
    reference = transforms.Compose(both)
    rng = np.random.default_rng(size)
    shapes = [
        (1, 1),
        (1, 7),
        (20, 31),
        (256, 256),
        (255, 257),
        (333, 500),
        (500, 333),
        (37, 301),
        (301, 37),
        (225, 224),
    ]
    shapes += [tuple(map(int, rng.integers(8, 420, 2))) for _ in range(40)]
    for seed, (width, height) in enumerate(shapes):
        data = encoded(picture(width, height, seed), "PNG")
        boxes = draw(recipe, 0, 0, np.array([seed]), np.array([height]), np.array([width])).boxes
        assert boxes.shape == (1, 1, 4)
        pixels = decode(data, height, width)
        ours = resize_region(pixels, boxes[0, 0], size, recipe.crop.interpolation)
        assert mean_difference(ours, reference(decoded_by_pillow(data))) <= 0.5, (width, height)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_decoders_stream_the_center_view_of_torchvision(photos: Path, decoder: str) -> None:
    store, recipe = open_store(photos), center_view(32)
    rows = store.index
    boxes = draw(recipe, 0, 0, np.arange(60), rows["height"], rows["width"]).boxes
    reference = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    ((crops, good),) = decoder_of(decoder, store, recipe).stream([(np.arange(60), boxes)])
    assert good.all()
    assert (
        max(mean_difference(crops[0, i], reference(Image.open(store.name(i)))) for i in range(60))
        <= 0.5
    )


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_crop_view_is_resized_crop_of_torchvision(photos: Path, decoder: str) -> None:
    """Bilinear and antialiased; boxes smaller and larger than the view."""
    store, every_sample = open_store(photos), np.arange(60)
    for size in (24, 64):
        recipe = crop_view(size)
        boxes = draw(recipe, 5, 0, every_sample, store.index["height"], store.index["width"]).boxes
        ((crops, good),) = decoder_of(decoder, store, recipe).stream([(every_sample, boxes)])
        assert good.all()
        for i, (left, top, right, bottom) in enumerate(boxes[0].astype(int).tolist()):
            image = Image.open(store.name(i))
            expected = transforms.functional.resized_crop(
                image, top, left, bottom - top, right - left, [size, size]
            )
            assert mean_difference(crops[0, i], expected) <= 0.5


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(("size", "resize"), [(32, None), (48, 32), (224, 256)])
def test_whole_view_is_two_resizes_of_torchvision(
    photos: Path, decoder: str, size: int, resize: int | None
) -> None:
    store, recipe = open_store(photos), whole_view(size, resize)
    boxes = draw(recipe, 0, 0, np.arange(60), store.index["height"], store.index["width"]).boxes
    reference = transforms.Compose(
        [transforms.Resize(resize or 37), transforms.Resize((size, size))]
    )
    ((crops, good),) = decoder_of(decoder, store, recipe).stream([(np.arange(60), boxes)])
    assert good.all()
    expected = [reference(Image.open(store.name(i))) for i in range(60)]
    differences = [mean_difference(crops[0, i], expected[i]) for i in range(60)]
    assert max(differences) <= (0 if decoder == "cpu" else 0.5)


# Pixels


@pytest.mark.parametrize("name", EXAMPLE_IMAGES)
def test_pixels_are_those_of_pillow(name: str) -> None:
    data = EXAMPLE_IMAGES[name]
    assert image_size(data) == (30, 41)
    pixels = decode(data, 30, 41).permute(1, 2, 0)
    assert pixels.is_contiguous()  # channels last in memory
    assert np.array_equal(pixels, decoded_by_pillow(data))


def test_examples_really_have_alpha_and_rotation() -> None:
    assert Image.open(io.BytesIO(EXAMPLE_IMAGES["png rgba"])).mode == "RGBA"
    assert "transparency" in Image.open(io.BytesIO(EXAMPLE_IMAGES["png palette"])).info
    assert Image.open(io.BytesIO(EXAMPLE_IMAGES["rotated jpeg"])).getexif()[0x0112] == 6


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 97].reshape(96, 97)
    decoded = decode(encoded(Image.fromarray(levels), "PNG"), 96, 97)
    assert np.array_equal(decoded, np.repeat(np.rint(levels / 257.0)[None], 3, axis=0))
    assert decoded.max() == 254


def test_16_bit_colours_are_those_of_pillow() -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    data = png(6, 5, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels), depth=16)
    assert np.array_equal(decode(data, 5, 6).permute(1, 2, 0), levels >> 8)


# Images that cannot be used


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_with_the_reason(name: str) -> None:
    data, reason = BAD_IMAGES[name]
    with pytest.raises(BadImage, match=reason):
        decode(data, 30, 41)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["a jpeg bomb", "a png bomb", "a smaller png bomb"])
def test_huge_images_are_refused_before_decoding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*arguments: Any, **options: Any) -> None:
        pytest.fail("it was decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    side = 10_000 if "smaller" in name else 20_000
    with pytest.raises(BadImage, match="pixels"):
        decode(BAD_IMAGES[name][0], side, side)


def test_images_of_one_pixel_decode() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.new("RGB", (1, 1), (200, 30, 90)), format)
        assert image_size(data) == (1, 1)
        assert np.array_equal(decode(data, 1, 1).permute(1, 2, 0), decoded_by_pillow(data))


def test_image_size_skips_long_segments_tables_and_fill_bytes() -> None:
    plain = encoded(picture(41, 30))
    frame, tables, scan = (
        plain.index(marker) for marker in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda")
    )
    tables_first = plain[:frame] + plain[tables:scan] + plain[frame:tables] + plain[scan:]
    thumbnail = encoded(picture(16, 9))  # a size of its own, inside a segment that must be skipped
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + thumbnail.ljust(65_533, b"\xff")
    for data in (
        plain[:2] + 3 * segment + plain[2:],
        plain[:2] + b"\xff\xff\xff" + plain[2:],
        tables_first,
    ):
        assert image_size(data) == (30, 41)
        assert np.array_equal(decode(data, 30, 41), decode(plain, 30, 41))


def test_random_damage_decodes_or_raises_bad_image() -> None:
    rng = np.random.default_rng(0)
    bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in EXAMPLE_IMAGES.values():
            for _ in range(60):
                damaged = bytearray(data)
                for at in rng.integers(0, min(len(data), 700), rng.integers(1, 6)):
                    damaged[at] = rng.integers(256)
                try:
                    assert decode(bytes(damaged), 30, 41).shape == (3, 30, 41)
                except BadImage as error:
                    assert str(error)  # noqa: PT017  # either outcome is right
                    bad += 1
    assert bad > 100


def lossless_jpeg(bits: int) -> bytes:
    """One grey pixel, with the middle value of that many bits."""
    frame = b"\xff\xc3\0\x0b" + bytes([bits]) + b"\0\1\0\1\1\1\x11\0"
    table = b"\xff\xc4\0\x14\0\1" + bytes(16)
    return b"\xff\xd8" + frame + table + b"\xff\xda\0\x08\1\1\0\1\0\0\x7f\xff\xd9"


def test_jpegs_of_fewer_than_8_bits_are_refused_as_by_pillow() -> None:
    assert decode(lossless_jpeg(8), 1, 1).tolist() == [[[128]]] * 3
    assert np.array_equal(decoded_by_pillow(lossless_jpeg(8)), [[[128] * 3]])
    with pytest.raises(BadImage, match="not a JPEG"):
        decode(lossless_jpeg(5), 1, 1)


def test_decode_refuses_pixels_of_another_size_than_the_header() -> None:
    """A segment after a marker without length hides a frame of another size."""
    jpeg = EXAMPLE_IMAGES["jpeg"]
    frame = jpeg[jpeg.index(b"\xff\xc0") :][:19]
    fake = frame[:5] + struct.pack(">HH", 64, 80) + frame[9:]
    comment = b"\xff\xe0" + struct.pack(">H", 65_530) + bytes(65_500) + fake.ljust(28, b"\0")
    data = b"\xff\xd8\xff\x01" + comment + jpeg[2:]
    height, width = image_size(data)
    assert (height, width) == (64, 80)
    with pytest.raises(BadImage):
        decode(data, height, width)


def test_image_size_refuses_garbage_after_a_jpeg_marker() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        garbage = b"\xff\xd8\xff\xe0" + rng.bytes(int(rng.integers(0, 40)))
        with pytest.raises(BadImage):
            image_size(garbage)
