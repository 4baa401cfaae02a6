"""Decoding and cropping against Pillow, the reference of the decode contract, and torchvision's transforms on it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from pipeline import open_store
from pipeline.decoders import FOR_ANY_STORE
from pipeline.images import BadImage, crop, decode, image_size
from pipeline.recipe import barlow_twins, center_view, crop_view, draw, whole_view
from tests.helpers.images import encoded, picture
from tests.helpers.stores import decoder_of

Box = tuple[int, int, int, int]


def by_pillow(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency, which is dropped
        return Image.open(io.BytesIO(data)).convert("RGB")


def difference(ours: Tensor, reference: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    expected = np.asarray(reference, dtype=np.int16)
    assert ours.dtype == torch.uint8
    assert tuple(ours.shape) == expected.shape
    return float(np.abs(ours.numpy() - expected).mean())


# ── crops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_box(rng: np.random.Generator, width: int, height: int, kind: int) -> Box:
    left, top = int(rng.integers(width)), int(rng.integers(height))
    right, bottom = int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
    thin = (
        (left, top, left + 1, top + 1),
        (left, 0, left + 1, height),
        (0, top, width, top + 1),
        (left, top, min(left + 2, width), bottom),
        (0, 0, width, height),
    )
    return thin[kind] if kind < len(thin) else (left, top, right, bottom)


def test_crops_are_pillows_crop_then_resize() -> None:
    """A thousand boxes in fifty JPEGs, single pixels, lines and whole images among them."""
    rng = np.random.default_rng(0)
    differences = []
    for i in range(50):
        width, height = (32, 32) if i % 10 == 0 else map(int, rng.integers(32, 400, 2))
        data = encoded(picture(width, height, seed=i), quality=80)
        pixels, image = decode(data, height, width), by_pillow(data)
        for kind in range(20):
            box = some_box(rng, width, height, kind)
            size = (32, 96, 224)[kind % 3]
            ours = crop(
                pixels,
                np.array(box, dtype=np.float32),
                size,
                "bicubic",
                reads_outside=False,
                resizes_first=False,
            )
            expected = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            differences.append(difference(ours, expected))
    assert len(differences) == 1000
    assert max(differences) <= 0.5


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_streamed_crops_are_pillows_in_the_order_of_the_plan(photos: Path, decoder: str) -> None:
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
                assert difference(crops[view, i], reference) <= 0.5


@pytest.mark.parametrize(
    ("size", "resize"), [(224, None), (224, 224), (33, None), (32, 47), (32, 32)]
)
def test_the_test_view_is_torchvisions_resize_and_center_crop(
    size: int, resize: int | None
) -> None:
    """Odd sizes, long and thin ones, and images smaller than the side they are resized to."""
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
        ours = crop(
            decode(data, height, width),
            boxes[0, 0],
            size,
            recipe.crop.interpolation,
            reads_outside=True,
            resizes_first=False,
        )
        assert difference(ours, reference(by_pillow(data))) <= 0.5, (width, height)


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_the_streamed_test_view_reads_outside_its_box(photos: Path, decoder: str) -> None:
    store, recipe = open_store(photos), center_view(32)
    rows = store.index
    boxes = draw(recipe, 0, 0, np.arange(60), rows["height"], rows["width"]).boxes
    reference = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    ((crops, good),) = decoder_of(decoder, store, recipe).stream([(np.arange(60), boxes)])
    assert good.all()
    assert (
        max(difference(crops[0, i], reference(Image.open(store.name(i)))) for i in range(60)) <= 0.5
    )


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
def test_the_training_view_of_classifiers_is_torchvisions_resized_crop(
    photos: Path, decoder: str
) -> None:
    """Bilinear and antialiased; boxes smaller and larger than the view."""
    store, everyone = open_store(photos), np.arange(60)
    for size in (24, 64):
        recipe = crop_view(size)
        boxes = draw(recipe, 5, 0, everyone, store.index["height"], store.index["width"]).boxes
        ((crops, good),) = decoder_of(decoder, store, recipe).stream([(everyone, boxes)])
        assert good.all()
        for i, (left, top, right, bottom) in enumerate(boxes[0].astype(int).tolist()):
            image = Image.open(store.name(i))
            expected = transforms.functional.resized_crop(
                image, top, left, bottom - top, right - left, [size, size]
            )
            assert difference(crops[0, i], expected) <= 0.5


@pytest.mark.parametrize("decoder", FOR_ANY_STORE)
@pytest.mark.parametrize(("size", "resize"), [(32, None), (48, 32), (224, 256)])
def test_the_view_of_whole_images_is_two_resizes_of_torchvisions(
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
    differences = [difference(crops[0, i], expected[i]) for i in range(60)]
    assert max(differences) <= (0 if decoder == "torchvision" else 0.5)


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def palette_png() -> bytes:
    image = picture(41, 30).quantize(20)
    return encoded(image, "PNG", transparency=bytes(range(0, 200, 10)))


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(41, 30), exif=exif)


def jpeg_441() -> bytes:
    """Chroma at a quarter of the lines. A unit has four blocks of luma and two of chroma, as in 4:2:0."""
    data = bytearray(encoded(picture(41, 30), subsampling=2))
    luma = data.index(b"\xff\xc0") + 11
    assert data[luma] == 0x22
    data[luma] = 0x14
    return bytes(data)


FORMATS = {
    "jpeg": encoded(picture(41, 30), quality=75),
    "jpeg 4:4:4": encoded(picture(41, 30), quality=95, subsampling=0),
    "jpeg 4:2:2": encoded(picture(41, 30), subsampling=1),
    "jpeg 4:4:1": jpeg_441(),
    "jpeg with restarts": encoded(picture(41, 30), restart_marker_blocks=2),
    "progressive jpeg": encoded(picture(41, 30), progressive=True),
    "grey jpeg": encoded(picture(41, 30, mode="L")),
    "cmyk jpeg": encoded(picture(41, 30, mode="CMYK")),
    "rotated jpeg": rotated_jpeg(),
    "png": encoded(picture(41, 30), "PNG"),
    "png rgb with a transparent colour": encoded(picture(41, 30), "PNG", transparency=(1, 2, 3)),
    "png rgba": encoded(picture(41, 30, mode="RGBA"), "PNG"),
    "png grey": encoded(picture(41, 30, mode="L"), "PNG"),
    "png grey with a transparent level": encoded(picture(41, 30, mode="L"), "PNG", transparency=7),
    "png grey and alpha": encoded(picture(41, 30, mode="LA"), "PNG"),
    "png palette": palette_png(),
    "png 1 bit": encoded(picture(41, 30, mode="1"), "PNG"),
    "webp": encoded(picture(41, 30), "WEBP"),
    "bmp": encoded(picture(41, 30), "BMP"),
    "palette bmp": encoded(picture(41, 30, mode="P"), "BMP"),
    "ppm": encoded(picture(41, 30), "PPM"),
    "lossless webp with alpha": encoded(picture(41, 30, mode="RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_pillows(name: str) -> None:
    data = FORMATS[name]
    assert image_size(data) == (30, 41)
    pixels = decode(data, 30, 41).permute(1, 2, 0)
    assert pixels.is_contiguous()  # channels last in memory
    assert np.array_equal(pixels, by_pillow(data))


def test_alpha_and_rotation_are_really_in_the_examples() -> None:
    assert Image.open(io.BytesIO(FORMATS["png rgba"])).mode == "RGBA"
    assert "transparency" in Image.open(io.BytesIO(FORMATS["png palette"])).info
    assert Image.open(io.BytesIO(FORMATS["rotated jpeg"])).getexif()[0x0112] == 6


def test_16_bit_greys_are_scaled_not_clipped() -> None:
    levels = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 97].reshape(96, 97)
    decoded = decode(encoded(Image.fromarray(levels), "PNG"), 96, 97)
    assert np.array_equal(decoded, np.repeat(np.rint(levels / 257.0)[None], 3, axis=0))
    assert decoded.max() == 254


def test_16_bit_colours_are_pillows() -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    data = png(6, 5, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels), depth=16)
    assert np.array_equal(decode(data, 5, 6).permute(1, 2, 0), levels >> 8)


# ── what cannot be used ──────────────────────────────────────────────────────────────────────────────────────────────


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """An RGB PNG of that claimed size around those filtered rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """A JPEG that claims that size and ends soon."""
    data = FORMATS["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


JPEG, PNG, WEBP = (FORMATS[name] for name in ("jpeg", "png", "webp"))
BAD = {
    "nothing": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "no JPEG, PNG, WebP or BMP"),
    "a gif": (encoded(picture(41, 30, mode="P"), "GIF"), "no JPEG, PNG, WebP or BMP"),
    "two bytes of a jpeg": (b"\xff\xd8", "no JPEG, PNG, WebP or BMP"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "a jpeg without its last bytes": (JPEG[:-40], "truncated"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
    "half a webp": (WEBP[: len(WEBP) // 2], "."),
    "another size": (encoded(picture(30, 41)), "30 x 41 pixels, but 41 x 30 when it was indexed"),
    "no height": (jpeg(41, 0), "its size is 41 x 0 pixels"),
    "a jpeg bomb": (jpeg(20_000, 20_000), "20000 x 20000 pixels: more than"),
    "a png bomb": (png(20_000, 20_000, b""), "400000000 pixels"),
    "a smaller png bomb": (png(10_000, 10_000, b""), "10000 x 10000 pixels: more than"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_a_bad_image_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        decode(data, 30, 41)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["a jpeg bomb", "a png bomb", "a smaller png bomb"])
def test_huge_images_are_refused_before_they_are_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*arguments: Any, **options: Any) -> None:
        pytest.fail("it was decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    side = 10_000 if "smaller" in name else 20_000
    with pytest.raises(BadImage, match="pixels"):
        decode(BAD[name][0], side, side)


def test_images_of_one_pixel_decode() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.new("RGB", (1, 1), (200, 30, 90)), format)
        assert image_size(data) == (1, 1)
        assert np.array_equal(decode(data, 1, 1).permute(1, 2, 0), by_pillow(data))


def test_sizes_are_read_past_long_segments_tables_and_fill_bytes() -> None:
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


def test_damaged_bytes_decode_or_are_bad_images_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in FORMATS.values():
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
    """One grey pixel, in the middle of what that many bits can say."""
    frame = b"\xff\xc3\0\x0b" + bytes([bits]) + b"\0\1\0\1\1\1\x11\0"
    table = b"\xff\xc4\0\x14\0\1" + bytes(16)
    return b"\xff\xd8" + frame + table + b"\xff\xda\0\x08\1\1\0\1\0\0\x7f\xff\xd9"


def test_jpegs_of_fewer_bits_are_refused_as_by_pillow() -> None:
    assert decode(lossless_jpeg(8), 1, 1).tolist() == [[[128]]] * 3
    assert np.array_equal(by_pillow(lossless_jpeg(8)), [[[128] * 3]])
    with pytest.raises(BadImage, match="no JPEG"):
        decode(lossless_jpeg(5), 1, 1)


def test_the_size_in_the_index_is_the_size_of_the_pixels() -> None:
    """A marker without a length, taken for one that has, leads to the size of a frame in the comment."""
    frame = JPEG[JPEG.index(b"\xff\xc0") :][:19]
    fake = frame[:5] + struct.pack(">HH", 64, 80) + frame[9:]
    comment = b"\xff\xe0" + struct.pack(">H", 65_530) + bytes(65_500) + fake.ljust(28, b"\0")
    data = b"\xff\xd8\xff\x01" + comment + JPEG[2:]
    height, width = image_size(data)
    assert (height, width) == (64, 80)
    with pytest.raises(BadImage):
        decode(data, height, width)


def test_garbage_after_a_jpeg_marker_has_no_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        garbage = b"\xff\xd8\xff\xe0" + rng.bytes(int(rng.integers(0, 40)))
        with pytest.raises(BadImage):
            image_size(garbage)
