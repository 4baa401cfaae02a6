"""Encoded images on the CPU: their size, their pixels, and resized crops of them.

The pixels are those of Pillow's `convert("RGB")`: no EXIF rotation, slow DCT, full chroma
upsampling; 16-bit grey is scaled by 1/257. JPEGs are decoded by libjpeg-turbo through simplejpeg,
which is identical to Pillow to the bit and faster; all other formats by Pillow. Every decoder in
`decoders/` keeps to this.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# Pillow's own bound, 268 MB when decoded. Larger images are refused before they are decoded: a file
# of 1 kB can claim any size.
MAX_PIXELS = 89_478_485
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PPM = b"P6\n%d %d\n255\n"  # width and height of the raw RGB pixels that follow

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")  # FFCV keeps raw pixels, read as PPM
_JPEG_START = b"\xff\xd8"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers

Encoded = bytes | memoryview
Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

# `image_size` refuses the images that this warns about.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An encoded image that cannot be used. The message gives the reason."""


def image_size(data: Encoded) -> tuple[int, int]:
    """Height and width in pixels, from the header of an encoded image.

    Raises:
        BadImage: If it has no header that can be read, or more than MAX_PIXELS.
    """
    size = _jpeg_size(data)
    if size is None:
        with open_image(data) as image:
            size = image.height, image.width
    height, width = size
    if height == 0 or width == 0:
        raise BadImage(f"its size is {width} x {height} pixels (it is empty)")
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels: the limit is {MAX_PIXELS:,}")
    return height, width


def encoded_bytes(picture: Picture) -> bytes:
    """An image in any form as encoded bytes, for use in a `MemoryStore`.

    A PIL image or an array becomes a PPM of the pixels that `decode` would return.

    Args:
        picture: The path of an image file, which is returned as it is without looking at it; a
            PIL image; or an array uint8 [H, W, 3] (RGB) or [H, W] (grey).

    Raises:
        ValueError: If the file cannot be read, or for another mode, shape or dtype.
    """
    if isinstance(picture, (str, os.PathLike)):
        return _read_file(picture)
    if isinstance(picture, Image.Image):
        return ppm_bytes(_pixels_of_pil_image(picture))
    return ppm_bytes(_pixels_of_array(picture))


def _read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"{os.fspath(path)}: {error.strerror}. Name the file of an image"
        ) from None


def _pixels_of_pil_image(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise ValueError(
            "a PIL image of mode F has float values of unknown range: convert it to RGB or L"
        )
    try:
        return _rgb(image.copy())
    except OSError as error:  # only here is it read from its file
        name = getattr(image, "filename", "") or "a PIL image"
        raise BadImage(f"{name}: {error}") from error


def _pixels_of_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = np.asarray(array)
    is_rgb = pixels.ndim == 3 and pixels.shape[2] == 3
    is_gray = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (is_rgb or is_gray):
        raise ValueError(
            f"an array {list(pixels.shape)} of {pixels.dtype} is not an image: give uint8 "
            "[height, width, 3] in the order RGB, or [height, width] if grey; or a path, or a PIL "
            "image"
        )
    if is_gray:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels


def ppm_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [H, W, 3] as a PPM: without loss, and without time to encode or decode."""
    height, width = pixels.shape[:2]
    return PPM % (width, height) + pixels.tobytes()


def decode(data: Encoded, height: int, width: int) -> Tensor:
    """The pixels of an encoded image, uint8 [3, height, width], channels last in memory.

    Raises:
        BadImage: If it does not decode completely, or if its size is not the given one (that of
            the store's index).
    """
    if not data:
        raise BadImage("it cannot be read, or is empty")
    size = image_size(data)
    if size != (height, width):
        raise BadImage(f"{size[1]} x {size[0]} pixels, but {width} x {height} when it was indexed")
    pixels = _decode_jpeg(data, size)
    if pixels is None:
        with open_image(data) as image:
            pixels = _rgb(image)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: Encoded, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The pixels [H, W, 3] of a JPEG; None if Pillow has to decode it.

    Pillow decodes CMYK and 4:4:1, and decides which flaws in the data are tolerable.
    """
    if data[:2] != _JPEG_START:
        return None
    with suppress(ValueError, KeyError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == size and colours in ("YCbCr", "RGB", "Gray"):
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return None


def crop_and_resize(
    pixels: Tensor, box: NDArray[np.float32], size: int, interpolation: str
) -> Tensor:
    """Pillow's `crop(box).resize(size)`: nothing outside the box is read.

    Args:
        pixels: uint8 [3, H, W].
        box: Left, top, right, bottom, in whole pixels.
        size: Height and width of the result.
        interpolation: `bilinear` or `bicubic`; always antialiased.

    Returns:
        uint8 [size, size, 3].
    """
    left, top, right, bottom = map(int, box)
    # torch's kernel for packed RGB is faster than its strided one by more than this copy costs.
    inside = pixels[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(inside, (size, size), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def resize_region(
    pixels: Tensor, box: NDArray[np.float32], size: int, interpolation: str
) -> Tensor:
    """Pillow's `resize(size, box=box)`: the filter also reads pixels outside the box.

    As `crop_and_resize`, but the box may be fractional.
    """
    return _resize_region(_pil_image(pixels), box, size, Image.Resampling[interpolation.upper()])


def resize_twice(pixels: Tensor, box: NDArray[np.float32], size: int, interpolation: str) -> Tensor:
    """Pillow's `resize((right, bottom)).resize(size)` of the whole image.

    As `crop_and_resize`, but the box is (0, 0, width, height) after the first resize.
    """
    resample = Image.Resampling[interpolation.upper()]
    width, height = int(box[2]), int(box[3])
    resized = _pil_image(pixels).resize((width, height), resample)
    return _resize_region(resized, box, size, resample)


def _pil_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _resize_region(
    image: Image.Image, box: NDArray[np.float32], size: int, resample: Image.Resampling
) -> Tensor:
    left, top, right, bottom = map(float, box)
    # As float32, the box may be rounded to slightly past the edge.
    inside = (left, top, min(right, image.width), min(bottom, image.height))
    return torch.from_numpy(np.array(image.resize((size, size), resample, box=inside)))


def _jpeg_size(data: Encoded) -> tuple[int, int] | None:
    """Height and width from the first start-of-frame segment of a JPEG.

    Ten times as fast as opening the image with Pillow. None if there is no such segment, or if the
    samples do not have 8 bits, which Pillow refuses.
    """
    if data[:2] != _JPEG_START:
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            bits = data[at + 4]
            if bits != 8:
                return None
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


@contextmanager
def open_image(data: Encoded) -> Iterator[Image.Image]:
    """`Image.open`, but all that Pillow and its codecs raise in the block becomes `BadImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise BadImage("it is not a JPEG, PNG, WebP or BMP that can be opened") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except Exception as error:
        raise BadImage(f"truncated or damaged: {error}") from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of a PIL image of any mode except F."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them at 255
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    # The alpha of a palette, which convert("RGB") ignores but warns about.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))
