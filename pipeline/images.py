"""Encoded images on the CPU: their size, their pixels, and resized crops of them. The decode contract of every decoder.

Pixels are Pillow's `convert("RGB")`: no EXIF rotation, slow DCT, full chroma upsampling; 16-bit greys scaled by 1/257.
JPEGs go through libjpeg-turbo by simplejpeg, bit-identical to Pillow and faster; all else goes through Pillow.
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

MAX_PIXELS = 89_478_485  # Pillow's own bound, 268 MB decoded. Larger is refused undecoded: 1 kB can claim any size.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "PPM",
)  # the last for the pixels that FFCV keeps in a beton
PPM = b"P6\n%d %d\n255\n"  # width and height of the raw RGB pixels that follow

Encoded = bytes | memoryview
Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # `image_size` refuses what it warns of


class BadImage(ValueError):
    """An encoded image that cannot be used; the message says why."""


def image_size(data: Encoded) -> tuple[int, int]:
    """Height and width in pixels from the header of an encoded image of `_FORMATS`; `BadImage` where there is none."""
    size = _jpeg_size(data)
    if size is None:
        with open_image(data) as image:
            size = image.height, image.width
    if 0 in size:
        raise BadImage(f"its size is {size[1]} x {size[0]} pixels")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage(f"{size[1]} x {size[0]} pixels: more than {MAX_PIXELS:,}")
    return size


def encoded_bytes(picture: Picture) -> bytes:
    """A file as it is, or a PIL image, or an array [H, W, 3] (RGB) or [H, W] (grey), as a PPM of the pixels that
    `decode` would give: so that whatever is at hand goes through one pipeline.

    ValueError, with the file if it is one, for what cannot be used; that a file is an image is not looked at.
    """
    if isinstance(picture, (str, os.PathLike)):
        try:
            with open(picture, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError(
                f"{os.fspath(picture)}: {error.strerror}. Name the file of an image"
            ) from None
    if isinstance(picture, Image.Image):
        if picture.mode == "F":
            raise ValueError(
                "a PIL image of mode F holds numbers whose range it does not say: make it RGB or L"
            )
        try:
            pixels = _rgb(picture.copy())
        except OSError as error:  # it is read from its file only here
            raise BadImage(
                f"{getattr(picture, 'filename', '') or 'a PIL image'}: {error}"
            ) from error
    else:
        pixels = np.asarray(picture)
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or pixels.shape[2:] not in ((), (3,))
        ):
            raise ValueError(
                f"an array {list(pixels.shape)} of {pixels.dtype} is no image: give uint8 [height, width, 3] in the "
                "order RGB, or [height, width] if grey; or a path, or a PIL image"
            )
        pixels = np.broadcast_to(
            pixels if pixels.ndim == 3 else pixels[:, :, None], (*pixels.shape[:2], 3)
        )
    return as_ppm(pixels)


def as_ppm(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [H, W, 3] as an image that is read without a loss, and at once."""
    return PPM % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def decode(data: Encoded, height: int, width: int) -> Tensor:
    """The pixels of an encoded image of that size, uint8 [3, height, width], channels last in memory.

    Raises `BadImage` for whatever does not decode completely, or not to the size that the index promised.
    """
    found = image_size(data) if data else None
    if found is None:
        raise BadImage("it cannot be read, or is empty")
    if found != (height, width):
        raise BadImage(
            f"{found[1]} x {found[0]} pixels, but {width} x {height} when it was indexed"
        )
    if data[:2] == b"\xff\xd8":
        with suppress(
            ValueError, KeyError
        ):  # a flaw in the data, or 4:4:1: Pillow knows what can be lived with
            *header_size, colours, _ = simplejpeg.decode_jpeg_header(data)
            if tuple(header_size) == found and colours in (
                "YCbCr",
                "RGB",
                "Gray",
            ):  # CMYK is Pillow's as well
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
                return torch.from_numpy(pixels).permute(2, 0, 1)
    with open_image(data) as image:
        return torch.from_numpy(_rgb(image)).permute(2, 0, 1)


def crop(
    pixels: Tensor,
    box: NDArray[np.float32],
    size: int,
    interpolation: str,
    *,
    reads_outside: bool,
    resizes_first: bool,
) -> Tensor:
    """One box (left, top, right, bottom) of uint8 [3, H, W] pixels, resized to uint8 [size, size, 3].

    As Pillow does it: `crop(box).resize(size)`, which never reads outside a box of whole pixels, or, with
    `reads_outside`, `resize(size, box=box)`, which takes fractional boxes and filters across their edges. With
    `resizes_first` too, the box is all of the image after a resize to (right, bottom): `resize(...).resize(size)`.
    """
    if reads_outside:
        image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        resample = Image.Resampling[interpolation.upper()]
        left, top, right, bottom = map(float, box)
        if resizes_first:
            image = image.resize((int(right), int(bottom)), resample)
        box_in = (
            left,
            top,
            min(right, image.width),
            min(bottom, image.height),
        )  # float32 may round past the edge
        return torch.from_numpy(np.array(image.resize((size, size), resample, box=box_in)))
    left, top, right, bottom = map(int, box)
    # The copy is for speed: torch's kernel for packed RGB is faster than its strided one by more than it costs.
    inside = pixels[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    return F.interpolate(inside, (size, size), mode=interpolation, antialias=True)[0].permute(
        1, 2, 0
    )


def _jpeg_size(data: Encoded) -> tuple[int, int] | None:
    """Height and width from the first start-of-frame segment: ten times as fast as opening the image with Pillow.

    None where that is not found, or where samples have not 8 bits, which Pillow refuses.
    """
    if data[:2] != b"\xff\xd8":
        return None
    i = 2
    while i + 9 <= len(data) and data[i] == 0xFF:
        marker = data[i + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if data[i + 4] != 8:
                return None
            return int.from_bytes(data[i + 5 : i + 7]), int.from_bytes(data[i + 7 : i + 9])
        i += (
            1 if marker == 0xFF else 2 + int.from_bytes(data[i + 2 : i + 4])
        )  # a fill byte, or a whole segment
    return None


@contextmanager
def open_image(data: Encoded) -> Iterator[Image.Image]:
    """`Image.open`, with whatever Pillow and its codecs raise inside the block as `BadImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise BadImage("it is no JPEG, PNG, WebP or BMP that can be opened") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except Exception as error:
        raise BadImage(f"truncated or damaged: {error}") from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them at 255
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    image.info.pop(
        "transparency", None
    )  # a palette's alpha, which convert("RGB") ignores but warns about
    return np.array(image.convert("RGB"))
