"""JPEGs of all kinds, at 41 x 30 pixels: ordinary ones, unusual ones and damaged ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.helpers.images import EXAMPLE_IMAGES, encoded, picture, png


def refused_jpeg(seed: int = 0) -> bytes:
    """A whole header, but impossible Huffman tables: no decoder takes it; DALI finds out late."""
    data = bytearray(encoded(picture(41, 30, seed)))
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    return bytes(data)


def adobe_rgb_jpeg() -> bytes:
    return encoded(picture(41, 30), keep_rgb=True, quality=95)


def unnamed_rgb_jpeg() -> bytes:
    """RGB only according to its Adobe segment: its components are numbered as those of YCbCr."""
    data = bytearray(adobe_rgb_jpeg())
    for name, number in zip(b"RGB", (1, 2, 3), strict=True):
        for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
            at = data.index(marker) + first + (number - 1) * step
            assert data[at] == name
            data[at] = number
    return bytes(data)


def cmyk_jpeg_without_adobe() -> bytes:
    data = EXAMPLE_IMAGES["cmyk jpeg"]
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 16 :]


def upside_down_jpeg() -> bytes:
    """With an EXIF rotation by 180 degrees, which would not change the size if it were applied."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(picture(41, 30), exif=exif)


def padded_jpeg() -> bytes:
    return EXAMPLE_IMAGES["jpeg"] + bytes(5000)


def sixteen_bit_png() -> bytes:
    levels = np.random.default_rng(0).integers(0, 65536, (30, 41, 3), dtype=np.uint16)
    return png(41, 30, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels), depth=16)


# What DALI may decode itself.
ORDINARY_JPEGS = {
    name: data for name, data in EXAMPLE_IMAGES.items() if "jpeg" in name and name != "cmyk jpeg"
}
ORDINARY_JPEGS["upside-down jpeg"] = upside_down_jpeg()
ORDINARY_JPEGS["slightly padded jpeg"] = EXAMPLE_IMAGES["jpeg"] + bytes(512)
# What is decoded before DALI gets it.
OTHERS = {
    "rgb jpeg": adobe_rgb_jpeg(),
    "unnamed rgb jpeg": unnamed_rgb_jpeg(),
    "padded jpeg": padded_jpeg(),
}
OTHERS |= {"cmyk jpeg without adobe": cmyk_jpeg_without_adobe(), "16-bit png": sixteen_bit_png()}
ALL_IMAGES = {**EXAMPLE_IMAGES, **ORDINARY_JPEGS, **OTHERS}


def damaged_headers() -> dict[str, bytes]:
    """Headers that kill the process if DALI's own parser meets them in a large batch."""
    data = EXAMPLE_IMAGES["jpeg"]
    frame = data.index(b"\xff\xc0")
    return {
        "a broken segment": data[:20] + bytes(30) + data[50:],
        "a segment beyond the end": data[:frame] + b"\xff\xe2\xff\xff" + data[frame:],
        "twelve bits": data[: frame + 4] + b"\x0c" + data[frame + 5 :],
        "five components": data[: frame + 9] + b"\x05" + data[frame + 10 :],
        "lossless": data[: frame + 1] + b"\xc3" + data[frame + 2 :],
        "no scan": data[: data.index(b"\xff\xda")] + b"\xff\xd9",
    }
