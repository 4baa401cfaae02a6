"""Images as standard JPEGs, which every decoder reads alike; those that are standard pass through.

`jpeg_check.py` has the fast check of whether a JPEG is intact.
"""

from __future__ import annotations

import io
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..images import BadImage, decode, image_size, open_image
from .jpeg_check import is_intact

DEFAULT_QUALITY = 96  # from 96 on, libjpeg-turbo uses its accurate DCT
PASSED_THROUGH = "passed through"
_LARGEST_SIDE = 65_500  # pixels of a JPEG: libjpeg neither writes nor reads more


class StandardJpeg(NamedTuple):
    """A JPEG that every decoder reads to the same pixels: YCbCr, RGB or grey, and intact."""

    data: bytes
    height: int
    width: int
    treatment: str = PASSED_THROUGH  # what was done to make it so


def to_standard_jpeg(
    data: bytes, max_side: int | None, short_side: int | None, quality: int | None, validate: bool
) -> StandardJpeg:
    """Convert an encoded image to a standard JPEG; one that is standard passes through untouched.

    All others are decoded as in training, resized (bicubic, antialiased), and encoded with the
    chroma subsampling that their JPEG had, or none.

    Args:
        data: The encoded image.
        max_side: The longer side of the result, in pixels, at most.
        short_side: The shorter side of the result, in pixels, at most.
        quality: JPEG quality of what is encoded; JPEGs of a higher quality are re-encoded as well.
            None: `DEFAULT_QUALITY`, and quality alone is no reason to re-encode.
        validate: Also check the compressed data of what passes through, and re-encode images that
            only Pillow can read.

    Raises:
        BadImage: The image cannot be decoded (see `decode`), or is too large for a JPEG.
    """
    height, width = image_size(data)
    size = _bounded_size(height, width, max_side, short_side)

    if _is_jpeg(data):
        treatment, subsampling = _examine_jpeg(data, height, width)
    else:
        treatment, subsampling = "from other formats", "444"
    if treatment == PASSED_THROUGH:
        if size != (height, width):
            treatment = "resized"
        elif quality is not None and _estimate_quality(data) > quality:
            treatment = "encoded with less quality"
        elif validate and not _decodes_without_warning(data):
            treatment = "repaired"
    if treatment == PASSED_THROUGH:
        return StandardJpeg(data, height, width)

    if max(size) > _LARGEST_SIDE:
        raise BadImage(
            f"{size[1]} x {size[0]} pixels: a JPEG has at most {_LARGEST_SIDE:,} on a side; "
            f"try --max-side"
        )
    pixels = decode(data, height, width)  # [3, H, W]
    if size != (height, width):
        pixels = _resize(pixels, size)
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # [H, W, 3]
    # Pillow's encoder would keep the GIL.
    encoded = simplejpeg.encode_jpeg(rows, quality or DEFAULT_QUALITY, "RGB", subsampling)
    return StandardJpeg(encoded, *size, treatment)


def check_decodes(data: bytes, height: int, width: int) -> None:
    """Raise `BadImage` if `decode` would; for a standard JPEG in half of the time."""
    is_standard = (
        _is_jpeg(data)
        and image_size(data) == (height, width)
        and _examine_jpeg(data, height, width)[0] == PASSED_THROUGH
    )
    if not is_standard or not _decodes_without_warning(data):
        decode(data, height, width)


def _is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def _bounded_size(
    height: int, width: int, max_side: int | None, short_side: int | None
) -> tuple[int, int]:
    """Height and width, reduced by one factor until both bounds hold."""
    longer = max(height, width)
    shorter = min(height, width)
    factor = min(1, (max_side or longer) / longer, (short_side or shorter) / shorter)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 pixels [3, H, W] to `size`."""
    # [1, 3, H, W] with the strides of channels_last
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _decodes_without_warning(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes a standard JPEG without an error or a warning.

    Decoding to an eighth of the size reads all of the entropy-coded data.
    """
    if is_intact(data):
        return True
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError:
        return False
    return True


def _examine_jpeg(data: bytes, height: int, width: int) -> tuple[str, str]:
    """The treatment that the header of a JPEG asks for, and its chroma subsampling."""
    try:
        *size, colors, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: 4:4:1
        return "repaired", "444"
    if tuple(size) != (height, width):
        return "repaired", "444"
    if colors not in ("YCbCr", "RGB", "Gray"):
        return "from CMYK", "444"
    return PASSED_THROUGH, subsampling if subsampling in ("422", "420") else "444"


def _estimate_quality(data: bytes) -> int:
    """The quality, 1 to 100, with the standard luminance table that is closest to a JPEG's."""
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
