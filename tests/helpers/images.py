"""Images that the tests make: photographs, every format that can be decoded, and bad ones."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # conftest.py sets variables after importing this and before importing torch
    from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, as in a photograph: neither flat nor pure noise."""
    rng = np.random.default_rng(seed)
    coarse_shape = (max(1, height // 24) + 1, max(1, width // 24) + 1, 3)
    coarse = Image.fromarray(rng.integers(0, 256, coarse_shape, dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """An image as the bytes of a file; `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_photos(root: Path, count: int, classes: int = 3) -> Path:
    """Writes JPEGs of different sizes into a sub-folder for each class."""
    rng = np.random.default_rng(count)
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(40, 120, 2)
        path.write_bytes(encoded(picture(int(width), int(height), seed=i), quality=90))
    return root


def decoded_by_pillow(data: bytes) -> Image.Image:
    """The reference of every decoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency, which is dropped
        return Image.open(io.BytesIO(data)).convert("RGB")


def mean_difference(ours: Tensor, reference: Image.Image) -> float:
    """The mean absolute difference of uint8 [H, W, 3] from an image, in levels of 255."""
    expected = np.asarray(reference, dtype=np.int16)
    assert str(ours.dtype) == "torch.uint8"
    assert tuple(ours.shape) == expected.shape
    return float(np.abs(ours.numpy() - expected).mean())


def random_box(rng: np.random.Generator, width: int, height: int, kind: int) -> Box:
    """A random box in an image. The first five kinds are thin or tiny, or the whole image."""
    left, top = int(rng.integers(width)), int(rng.integers(height))
    right, bottom = int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
    extreme = (
        (left, top, left + 1, top + 1),
        (left, 0, left + 1, height),
        (0, top, width, top + 1),
        (left, top, min(left + 2, width), bottom),
        (0, 0, width, height),
    )
    return extreme[kind] if kind < len(extreme) else (left, top, right, bottom)


# Every format, at 41 x 30 pixels


def palette_png() -> bytes:
    image = picture(41, 30).quantize(20)
    return encoded(image, "PNG", transparency=bytes(range(0, 200, 10)))


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(41, 30), exif=exif)


def jpeg_441() -> bytes:
    """Chroma on a quarter of the lines: four blocks of luma and two of chroma, as in 4:2:0."""
    data = bytearray(encoded(picture(41, 30), subsampling=2))
    luma = data.index(b"\xff\xc0") + 11
    assert data[luma] == 0x22
    data[luma] = 0x14
    return bytes(data)


EXAMPLE_IMAGES = {
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


# What cannot be decoded as an image of 41 x 30 pixels


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """An RGB PNG that claims a size and contains these filtered rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """The header of a JPEG that claims a size, and the data of a smaller one."""
    data = EXAMPLE_IMAGES["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


JPEG, PNG, WEBP = (EXAMPLE_IMAGES[name] for name in ("jpeg", "png", "webp"))
# Name -> the bytes, and words of the reason.
BAD_IMAGES = {
    "nothing": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not a JPEG, PNG, WebP or BMP"),
    "a gif": (encoded(picture(41, 30, mode="P"), "GIF"), "not a JPEG, PNG, WebP or BMP"),
    "two bytes of a jpeg": (b"\xff\xd8", "not a JPEG, PNG, WebP or BMP"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "a jpeg without its last bytes": (JPEG[:-40], "truncated"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
    "half a webp": (WEBP[: len(WEBP) // 2], "."),
    "another size": (encoded(picture(30, 41)), "30 x 41 pixels, but 41 x 30 when it was indexed"),
    "no height": (jpeg(41, 0), "its size is 41 x 0 pixels"),
    "a jpeg bomb": (jpeg(20_000, 20_000), "20000 x 20000 pixels: the limit is"),
    "a png bomb": (png(20_000, 20_000, b""), "400000000 pixels"),
    "a smaller png bomb": (png(10_000, 10_000, b""), "10000 x 10000 pixels: the limit is"),
}
