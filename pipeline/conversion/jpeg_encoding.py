"""What is written: JPEGs that every decoder reads alike, passed through where they are so already."""

from __future__ import annotations

import io
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from ..images import BadImage, decode, image_size, open_image
from . import jpeg_check

QUALITY = 96  # of what is encoded, unless asked otherwise: from 96 on libjpeg-turbo takes its accurate DCT
UNTOUCHED = "passed through"
_MOST_SIDE = 65_500  # pixels, of a JPEG: libjpeg neither writes nor reads more


class Jpeg(NamedTuple):
    """An image that every decoder reads to the same pixels, and what was done to make it so."""

    data: bytes
    height: int
    width: int
    done: str = UNTOUCHED


def as_jpeg(
    data: bytes, max_side: int | None, short_side: int | None, quality: int | None, validate: bool
) -> Jpeg:
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
    done, subsampling = (
        _plain(data, height, width) if data[:2] == b"\xff\xd8" else ("from other formats", "444")
    )
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
        raise BadImage(
            f"{size[1]} x {size[0]} pixels: a JPEG has at most {_MOST_SIDE:,} on a side; try --max-side"
        )
    pixels = decode(data, height, width)
    if size != (height, width):
        packed = pixels.permute(1, 2, 0)[None].permute(
            0, 3, 1, 2
        )  # [1, 3, H, W], whose strides say: channels last
        pixels = F.interpolate(packed, size, mode="bicubic", antialias=True)[0]
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # [H, W, 3]
    # Pillow's encoder would keep the GIL.
    return Jpeg(simplejpeg.encode_jpeg(rows, quality or QUALITY, "RGB", subsampling), *size, done)


def check(data: bytes, height: int, width: int) -> None:
    """Raises `BadImage` where `decode` would, in half of the time for a JPEG."""
    plain = (
        data[:2] == b"\xff\xd8"
        and image_size(data) == (height, width)
        and _plain(data, height, width)[0] == UNTOUCHED
    )
    if not (plain and _is_whole(data)):
        decode(data, height, width)


def _is_whole(data: bytes) -> bool:
    """Whether a plain JPEG decodes without a warning: an eighth of its size needs all of the entropy-coded data."""
    if jpeg_check.is_whole(data):
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
    with open_image(data) as image:
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
