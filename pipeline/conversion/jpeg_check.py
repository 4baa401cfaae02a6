"""Whether an ordinary JPEG is whole, without decoding it: a walk over its Huffman codes that computes no coefficient.

Several symbols are looked up at a time, by which it takes about half as long as libjpeg-turbo's decoding to an eighth
of the size. It knows baseline JPEGs of one scan without restart markers, and is sure of nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

_compiled = partial(njit, nogil=True, error_model="numpy")
_LOOK = 13  # bits: the AC tables of an image just fit a core's nearest cache, and more was slower
_BITS = 31  # of a table's entry: how many bits to drop. The rest counts the coefficients, plus this where a block ends:
_END = 256
_LONG = 128  # in the place of a symbol that is too long for that table
_SAMPLING = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11")

Codes = tuple[
    bytes, bytes
]  # of DC and AC, as the file has them: a number, 16 counts, and the symbols


def is_whole(data: bytes) -> bool:
    """True only where libjpeg-turbo decodes a JPEG without an error or a warning; False says: not sure."""
    frame, codes, start = _header(data)
    distinct = tuple(dict.fromkeys(codes))
    tables = _tables(distinct) if codes else None
    if tables is None:
        return False
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    across, down = frame[7] >> 4, frame[7] & 15  # luma's blocks in an MCU
    mcus = -(height // (-8 * down)) * -(width // (-8 * across))
    plan = np.array([distinct.index(code) for code in codes[:1] * across * down + codes[1:]])
    return _run(_walk, np.frombuffer(data, np.uint8), start, mcus, plan, *tables)


def _header(data: bytes) -> tuple[bytes, list[Codes], int]:
    """The frame's segment, the codes of each component, and where the scan begins; no codes where it is unusual."""
    frame, huffman, quantizers, profiles, at = b"", dict[int, bytes](), set[int](), 0, 2
    usual = data[:2] == b"\xff\xd8"
    while usual and at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        segment, at = data[at + 4 : at + 2 + length], at + 2 + length
        usual = length >= 2 and at <= len(data)
        if marker == 0xDB:
            quantizers.update(segment[::65])
            usual &= len(segment) % 65 == 0
        elif marker == 0xC4:
            while segment and usual:
                size = 17 + sum(segment[1:17])
                usual = len(segment) >= size
                huffman[segment[0]], segment = segment[:size], segment[size:]
        elif marker == 0xC0:
            usual &= not frame and segment[:1] == b"\x08" and len(segment) in (9, 15)
            frame = segment
        elif marker == 0xDA:
            return frame, _codes(frame, segment, huffman, quantizers) if usual and frame else [], at
        elif marker == 0xE0 and segment[:5] == b"JFIF\0":
            usual &= segment[5:6] == b"\x01"
        elif marker == 0xEE and segment[:5] == b"Adobe":
            usual &= segment[11:12] in (b"\0", b"\x01")
        elif (
            marker == 0xE2 and segment[:12] == b"ICC_PROFILE\0"
        ):  # whose parts libjpeg-turbo puts together
            profiles += 1
            usual &= segment[12:14] == b"\x01\x01" and len(segment) > 14 and profiles == 1
        else:
            usual &= 0xE0 <= marker <= 0xEF or marker == 0xFE
    return b"", [], 0


def _codes(
    frame: bytes, scan: bytes, huffman: dict[int, bytes], quantizers: set[int]
) -> list[Codes]:
    """The Huffman codes of each component, if one usual scan has all of them; none otherwise."""
    ids, chosen = frame[6::3], [(which >> 4, 16 | which & 15) for which in scan[2:-3:2]]
    usual = (
        len(ids) == len(set(ids)) == frame[5]
        and frame[7::3] in _SAMPLING
        and all(0 < int.from_bytes(frame[i : i + 2]) <= 65500 for i in (1, 3))  # libjpeg's bounds
        and set(frame[8::3]) <= quantizers <= {0, 1, 2, 3}
        and {which for pair in chosen for which in pair}
        <= huffman.keys()
        <= {0, 1, 2, 3, 16, 17, 18, 19}
        and (scan[:1], scan[1:-3:2], scan[-3:]) == (frame[5:6], ids, b"\0\x3f\0")
        and len(scan) == 4 + 2 * frame[5]
    )
    return [(huffman[dc], huffman[ac]) for dc, ac in chosen] if usual else []


@lru_cache(maxsize=32)  # most JPEGs of an encoder share them
def _tables(codes: tuple[Codes, ...]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]] | None:
    """The entries of 13 bits, for as many symbols as these hold, and of 16 bits, for one; None for forbidden codes.

    They are [n, 2, 8192] and [n, 2, 65536] for n codes: what begins with a DC symbol, and what does not.
    """
    chained, single = (np.zeros((len(codes), 2, 1 << bits), np.uint16) for bits in (_LOOK, 16))
    for pair, *tables in zip(codes, chained, single, strict=True):
        if not _run(_fill, tuple(np.frombuffer(code, np.uint8) for code in pair), *tables):
            return None
    return chained, single


def _fill(pair: Any, chained: Any, single: Any) -> bool:
    for part in range(2):
        code, at = 0, 17
        for length in range(1, 17):
            if (
                code + pair[part][length] >= 1 << length
            ):  # libjpeg takes no code that is all ones either
                return False
            for _ in range(pair[part][length]):
                run, extra = pair[part][at] >> 4, pair[part][at] & 15
                steps = run + 1
                if part == 0 and (run > 0 or extra > 11):
                    return False
                if (
                    part == 1 and extra == 0
                ):  # of these, baseline JPEGs know two; the others stay unknown
                    steps = _END if run == 0 else 16 if run == 15 else 0
                if steps > 0:
                    single[part, code << 16 - length : code + 1 << 16 - length] = (
                        steps << 5 | length + extra
                    )
                code, at = code + 1, at + 1
            code <<= 1
    for part in range(2):
        for look in range(1 << _LOOK):
            bits, steps = 0, 0
            while steps < _END:
                entry = single[min(part + steps, 1), (look << 16 - _LOOK + bits) & 0xFFFF]
                if entry == 0 or bits + (entry & _BITS) > _LOOK:
                    break
                bits, steps = bits + (entry & _BITS), steps + (entry >> 5)
            chained[part, look] = steps << 5 | bits if bits else _LONG << 5
    return True


def _walk(data: Any, start: int, mcus: int, plan: Any, chained: Any, single: Any) -> bool:
    """Whether all blocks can be followed to their end, and the end of the image comes right after it."""
    # The next bits from the top, how many there are, and the next byte; unsigned, since a negative index costs a test.
    buffer, held, at, size = uint64(0), 0, uint64(start), uint64(len(data))
    one, two, three = uint64(1), uint64(2), uint64(3)
    for _ in range(mcus):
        for which in plan:
            k, part = 0, 0  # coefficients of this block so far; AC symbols follow the first one
            while k < 64:
                if held < 32:  # a symbol has 31 at most
                    word = uint64(0xFF)
                    if at + three < size:
                        word = uint64(data[at]) << uint64(24) | uint64(data[at + one]) << uint64(16)
                        word |= uint64(data[at + two]) << uint64(8) | uint64(data[at + three])
                    if (~word - uint64(0x01010101)) & word & uint64(
                        0x80808080
                    ) == 0:  # no byte is 0xFF
                        buffer |= word << uint64(32 - held)
                        held, at = held + 32, at + uint64(4)
                    else:
                        while held <= 56 and at + one < size:
                            byte = uint64(data[at])
                            if byte == 0xFF:
                                if data[at + one] != 0:  # a marker: no more bits
                                    break
                                at += one
                            buffer |= byte << uint64(56 - held)
                            held, at = held + 8, at + one
                entry: Any = np.int64(chained[which, part, buffer >> uint64(64 - _LOOK)])
                after = k + (entry >> 5)
                if (
                    64 < after < _END or after >= _END + 64
                ):  # a long symbol, or some of the next block as well
                    entry = np.int64(single[which, part, buffer >> uint64(48)])
                    after = k + (entry >> 5)
                    if entry == 0 or 64 < after < _END:
                        return False
                buffer <<= uint64(entry & _BITS)
                held -= entry & _BITS
                k, part = after, 1
            if held < 0:  # a marker, or the end of the file, came first
                return False
    return bool(held < 8 and at + one < size and data[at] == 0xFF and data[at + one] == 0xD9)


_unkept = {function: _compiled()(function) for function in (_fill, _walk)}
try:
    _kernels = {function: _compiled(cache=True)(function) for function in (_fill, _walk)}
except RuntimeError:  # neither this folder nor the user's can be written
    _kernels = dict(_unkept)


def _run(function: Callable[..., Any], *arguments: object) -> Any:
    """A kernel that is kept on disk; where that cannot be read or written, one that is not."""
    try:
        return _kernels[function](*arguments)
    except Exception as error:  # a damaged file raises anything, a full disk OSError
        if _kernels[function] is _unkept[function]:
            raise
        warnings.warn(
            f"Numba's cache cannot be used, so that each run compiles anew: {error!r}", stacklevel=2
        )
        _kernels[function] = _unkept[function]
        return _unkept[function](*arguments)
