"""Which JPEGs may be given to DALI as they are: `is_ordinary_jpeg`, a check of the header."""

from __future__ import annotations

_START = b"\xff\xd8"
_END = b"\xff\xd9"
_END_WITHIN = 1024  # bytes before the end of the file: some writers pad it

# Markers of segments.
_SCAN = 0xDA
_ADOBE = 0xEE
_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded, sequential or progressive: every decoder knows them
# Huffman and quantisation tables, restart intervals, application data, comments.
_ALLOWED = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)


def is_ordinary_jpeg(data: bytes, height: int, width: int) -> bool:
    """Whether `data` is an 8-bit grey or YCbCr JPEG of that size with a whole header and end.

    CMYK and RGB are not ordinary: DALI's parser takes any three components for YCbCr, and the
    decoders of some GPUs do not support four.
    """
    if not data.startswith(_START):
        return False
    size: tuple[int, int] | None = None
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        length = int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if marker == _SCAN:
            return size == (height, width) and _END in data[-_END_WITHIN:]
        if marker in _FRAMES and size is None:
            if not _is_ordinary_frame(body):
                return False
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        elif marker not in _ALLOWED or (marker == _ADOBE and _is_adobe_rgb_or_cmyk(body)):
            return False
        at += 2 + length
    return False


def _is_ordinary_frame(body: bytes) -> bool:
    """Whether a frame segment has 8 bits and one component, or three that are not named R, G, B."""
    bits = body[:1]
    if bits != b"\x08" or len(body) not in (9, 15):
        return False
    components = body[5]
    names = body[6::3]
    return len(body) == 6 + 3 * components and names != b"RGB"


def _is_adobe_rgb_or_cmyk(body: bytes) -> bool:
    """Whether an APP14 segment is Adobe's and says that the colours are not YCbCr."""
    transform = body[11:12]
    return body.startswith(b"Adobe") and transform != b"\x01"
