"""Standard JPEGs: what passes through, and what re-encoding does to the rest."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from pipeline.conversion.jpeg_encoding import check_decodes, to_standard_jpeg
from pipeline.images import BadImage, decode
from tests.helpers.images import EXAMPLE_IMAGES, decoded_by_pillow, encoded, picture


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean absolute difference of two images, in levels of 255."""
    return float(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean())


def difference_from_pillow(jpeg: bytes, image: Image.Image) -> float:
    """The difference of a JPEG from what Pillow makes of an image with the same settings."""
    subsampling = JpegImagePlugin.get_sampling(Image.open(io.BytesIO(jpeg)))
    reference = encoded(image, quality=96, subsampling=subsampling)
    return difference(decoded_by_pillow(jpeg), decoded_by_pillow(reference))


def test_reencoded_images_are_those_of_pillow() -> None:
    for name, data in EXAMPLE_IMAGES.items():
        jpeg = to_standard_jpeg(data, None, None, None, validate=True)
        with Image.open(io.BytesIO(jpeg.data)) as image:
            assert image.mode in ("RGB", "L")
        if jpeg.treatment != "passed through":
            original = decoded_by_pillow(data)
            # Pillow rounds colours of 16 bits differently.
            assert difference_from_pillow(jpeg.data, original) < 0.5, name
            assert difference(decoded_by_pillow(jpeg.data), original) < 6, name


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (500, 20), (90, 90)])
@pytest.mark.parametrize(
    ("max_side", "short_side"), [(100, None), (None, 100), (200, 100), (1000, 1000)]
)
def test_images_are_resized_to_the_bounds_or_pass_through(
    shape: tuple[int, int], max_side: int | None, short_side: int | None
) -> None:
    width, height = shape
    data = encoded(picture(width, height), quality=90)
    jpeg = to_standard_jpeg(data, max_side, short_side, None, validate=True)
    factor = min(1, (max_side or 10**6) / max(shape), (short_side or 10**6) / min(shape))
    if factor == 1:
        assert jpeg == (data, height, width, "passed through")
        return
    assert jpeg.treatment == "resized"
    assert abs(jpeg.width - width * factor) <= 0.5
    assert abs(jpeg.height - height * factor) <= 0.5
    size = (jpeg.width, jpeg.height)
    resized = decoded_by_pillow(data).resize(size, Image.Resampling.BICUBIC)
    assert difference_from_pillow(jpeg.data, resized) < 1.6


@pytest.mark.parametrize("quality", [30, 75, 90, 91, 95, 100])
def test_only_jpegs_of_a_higher_quality_are_reencoded(quality: int) -> None:
    data = encoded(picture(60, 50), quality=quality)
    jpeg = to_standard_jpeg(data, None, None, 90, validate=True)
    assert (jpeg.data == data) == (quality <= 90)
    if quality > 90:
        standard = encoded(picture(9, 9), quality=90)
        with (
            Image.open(io.BytesIO(jpeg.data)) as image,
            Image.open(io.BytesIO(standard)) as reference,
        ):
            assert image.quantization == reference.quantization
        assert jpeg.treatment == "encoded with less quality"


def damaged(seed: int, data: bytes) -> bytes:
    """An image cut off, with bytes removed, or with one or twenty bits flipped."""
    rng = np.random.default_rng(seed)
    changed = bytearray(data)
    kind = seed % 4
    if kind == 0:
        del changed[int(rng.integers(2, len(data))) :]
    elif kind == 1:
        first = int(rng.integers(2, len(data)))
        del changed[first : first + int(rng.integers(1, 200))]
    else:
        for at in rng.integers(2, len(data), 1 if kind == 2 else 20):
            changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def reason_of(examine: object, data: bytes) -> str:
    """Why a JPEG of 41 x 30 pixels is refused; "" if it is not."""
    try:
        examine(data, 30, 41)  # type: ignore[operator]
    except BadImage as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_check_refuses_what_decoding_refuses() -> None:
    names = [name for name in EXAMPLE_IMAGES if "jpeg" in name]
    decodes = []
    for seed in range(600):
        data = damaged(seed, EXAMPLE_IMAGES[names[seed % len(names)]])
        reason = reason_of(decode, data)
        assert reason_of(check_decodes, data) == reason
        decodes.append(not reason)
        try:
            jpeg = to_standard_jpeg(data, None, None, None, validate=True)
        except BadImage:
            continue
        check_decodes(jpeg.data, jpeg.height, jpeg.width)
        assert jpeg.treatment != "passed through" or jpeg.data == data
    assert 0.1 < np.mean(decodes) < 0.9
