"""Encoded images on the CPU: their size, their pixels, and resized crops of them. The decode contract of every decoder.

Pixels are Pillow's `convert("RGB")`: no EXIF rotation, slow DCT, full chroma upsampling; 16-bit greys scaled by 1/257.
JPEGs go through libjpeg-turbo by simplejpeg, bit-identical to Pillow and faster; all else goes through Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from . import entropy

MAX_PIXELS = 89_478_485  # Pillow's own bound, 268 MB decoded. Larger is refused undecoded: 1 kB can claim any size.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")  # the last for the pixels that FFCV keeps in a beton
PPM = b"P6\n%d %d\n255\n"  # width and height of the raw RGB pixels that follow
QUALITY = 96  # of what is encoded, unless asked otherwise: from 96 on libjpeg-turbo takes its accurate DCT
UNTOUCHED = "passed through"
_MOST_SIDE = 65_500  # pixels, of a JPEG: libjpeg neither writes nor reads more

Encoded = bytes | memoryview

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `image_size` refuses what it warns of


class BadImage(ValueError):
    """An encoded image that cannot be used; the message says why."""


def image_size(data: Encoded) -> tuple[int, int]:
    """Height and width in pixels from the header of an encoded image of `_FORMATS`; `BadImage` where there is none."""
    size = _jpeg_size(data)
    if size is None:
        with _open(data) as image:
            size = image.height, image.width
    if 0 in size:
        raise BadImage(f"its size is {size[1]} x {size[0]} pixels")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage(f"{size[1]} x {size[0]} pixels: more than {MAX_PIXELS:,}")
    return size


class Jpeg(NamedTuple):
    """An image that every decoder reads to the same pixels, and what was done to make it so."""

    data: bytes
    height: int
    width: int
    done: str = UNTOUCHED


def as_jpeg(data: bytes, max_side: int | None, short_side: int | None, quality: int | None, validate: bool) -> Jpeg:
    """An encoded image as a JPEG that is plain YCbCr, RGB or grey, its sides at most those, in pixels.

    One that is so already is passed through; `quality` also encodes again what was encoded with more than that (96 is
    the quality of the others where it is None). Others are decoded by the rules above, resized (bicubic, antialiased),
    and encoded with the chroma of their JPEG, or all of it. `validate` decodes what is passed through as well: raises
    `BadImage` where `decode` would, and encodes again what only Pillow can read. `BadImage` for what no JPEG can hold.
    """
    height, width = image_size(data)
    longer, shorter = max(height, width), min(height, width)
    shrink = min(1, (max_side or longer) / longer, (short_side or shorter) / shorter)
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    done, subsampling = _plain(data, height, width) if data[:2] == b"\xff\xd8" else ("from other formats", "444")
    if done == UNTOUCHED:
        if size != (height, width):
            done = "resized"
        elif quality is not None and _jpeg_quality(data) > quality:
            done = "encoded with less quality"
        elif not validate or _is_whole(data):
            return Jpeg(data, height, width)
        else:
            done = "repaired"
    if max(size) > _MOST_SIDE:
        raise BadImage(f"{size[1]} x {size[0]} pixels: a JPEG has at most {_MOST_SIDE:,} on a side; try --max-side")
    pixels = decode(data, height, width)
    if size != (height, width):
        packed = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # [1, 3, H, W], whose strides say: channels last
        pixels = F.interpolate(packed, size, mode="bicubic", antialias=True)[0]
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # [H, W, 3]
    return Jpeg(
        simplejpeg.encode_jpeg(rows, quality or QUALITY, "RGB", subsampling), *size, done
    )  # Pillow keeps the GIL


def check(data: bytes, height: int, width: int) -> None:
    """Raises `BadImage` where `decode` would, in half of the time for a JPEG."""
    plain = (
        data[:2] == b"\xff\xd8" and image_size(data) == (height, width) and _plain(data, height, width)[0] == UNTOUCHED
    )
    if not (plain and _is_whole(data)):
        decode(data, height, width)


def _is_whole(data: bytes) -> bool:
    """Whether a plain JPEG decodes without a warning: an eighth of its size needs all of the entropy-coded data."""
    if entropy.is_whole(data):
        return True
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError:
        return False
    return True


def _plain(data: bytes, height: int, width: int) -> tuple[str, str]:
    """What has to be done to a JPEG that libjpeg-turbo does not read like any other; and its chroma subsampling."""
    try:
        *size, colours, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # 4:4:1
        return "repaired", "444"
    if tuple(size) != (height, width):
        return "repaired", "444"
    if colours not in ("YCbCr", "RGB", "Gray"):
        return "from CMYK", "444"
    return UNTOUCHED, subsampling if subsampling in ("422", "420") else "444"


def _jpeg_quality(data: bytes) -> int:
    """The quality, 1 to 100, whose standard luminance table is the nearest to that of a JPEG."""
    with _open(data) as image:
        coarseness = sum(image.quantization[0])  # type: ignore[attr-defined]
    return int(np.abs(_standard_coarseness() - coarseness).argmin()) + 1


@cache
def _standard_coarseness() -> NDArray[np.int64]:
    """The sums of the luminance tables that libjpeg makes for the qualities 1 to 100, [100]."""

    def coarseness(quality: int) -> int:
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "JPEG", quality=quality)
        return sum(Image.open(buffer).quantization[0])  # type: ignore[attr-defined]

    return np.array([coarseness(quality) for quality in range(1, 101)])


def decode(data: Encoded, height: int, width: int) -> Tensor:
    """The pixels of an encoded image of that size, uint8 [3, height, width], channels last in memory.

    Raises `BadImage` for whatever does not decode completely, or not to the size that the index promised.
    """
    found = image_size(data) if data else None
    if found is None:
        raise BadImage("it cannot be read, or is empty")
    if found != (height, width):
        raise BadImage(f"{found[1]} x {found[0]} pixels, but {width} x {height} when it was indexed")
    if data[:2] == b"\xff\xd8":
        with suppress(ValueError, KeyError):  # a flaw in the data, or 4:4:1: Pillow knows what can be lived with
            *header_size, colours, _ = simplejpeg.decode_jpeg_header(data)
            if tuple(header_size) == found and colours in ("YCbCr", "RGB", "Gray"):  # CMYK is Pillow's as well
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
                return torch.from_numpy(pixels).permute(2, 0, 1)
    with _open(data) as image:
        return torch.from_numpy(_rgb(image)).permute(2, 0, 1)


def crop(pixels: Tensor, box: NDArray[np.float32], size: int, interpolation: str, *, reads_outside: bool) -> Tensor:
    """One box (left, top, right, bottom) of uint8 [3, H, W] pixels, resized to uint8 [size, size, 3].

    As Pillow does it: `crop(box).resize(size)`, which never reads outside a box of whole pixels, or, with
    `reads_outside`, `resize(size, box=box)`, which takes fractional boxes and filters across their edges.
    """
    if reads_outside:
        image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        resample = Image.Resampling[interpolation.upper()]
        left, top, right, bottom = map(float, box)
        box_in = (left, top, min(right, image.width), min(bottom, image.height))  # float32 may round past the edge
        return torch.from_numpy(np.array(image.resize((size, size), resample, box=box_in)))
    left, top, right, bottom = map(int, box)
    # The copy is for speed: torch's kernel for packed RGB is faster than its strided one by more than it costs.
    inside = pixels[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    return F.interpolate(inside, (size, size), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


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
        i += 1 if marker == 0xFF else 2 + int.from_bytes(data[i + 2 : i + 4])  # a fill byte, or a whole segment
    return None


@contextmanager
def _open(data: Encoded) -> Iterator[Image.Image]:
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
    image.info.pop("transparency", None)  # a palette's alpha, which convert("RGB") ignores but warns about
    return np.array(image.convert("RGB"))
