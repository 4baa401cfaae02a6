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
from numba import njit
from numpy.typing import NDArray

_compiled = partial(njit, nogil=True, error_model="numpy")
_LOOK = 13  # bits: the two tables of an image fill half of a core's nearest cache
_LOOKS = 1 << _LOOK
_BITS = 31  # of a table's entry: how many bits to drop. The rest counts the coefficients, plus this where a block ends:
_END = 256
_LONG = 128  # in the place of a symbol that is too long for that table
_SAMPLING = (b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11")  # 4:4:4, 4:2:2, 4:4:0 and 4:2:0

Codes = tuple[bytes, bytes]  # of DC and AC, as the file has them: a number, 16 counts, and the symbols


def is_whole(data: bytes) -> bool:
    """True only where libjpeg-turbo decodes a JPEG without an error or a warning; False says: not sure."""
    frame, codes, start = _header(data)
    tables = _tables(*dict.fromkeys(codes)) if codes else None
    if tables is None:
        return False
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    across, down = (frame[7] >> 4, frame[7] & 15)  # in blocks
    mcus = -(height // (-8 * down)) * -(width // (-8 * across))
    distinct = list(dict.fromkeys(codes))
    plan = [distinct.index(code) for code in codes[:1] * across * down + codes[1:]]
    return _run(_walk, np.frombuffer(data, np.uint8), start, mcus, np.array(plan), *tables)


def _header(data: bytes) -> tuple[bytes, list[Codes], int]:
    """The frame's segment, the codes of each component, and where the scan begins; no codes where it is unusual."""
    unusual: tuple[bytes, list[Codes], int] = b"", [], 0
    frame, huffman, quantizers, profiles, at = b"", dict[int, bytes](), set[int](), 0, 2
    if data[:2] != b"\xff\xd8":
        return unusual
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        segment, start, at = data[at + 4 : end], at, end
        if not start + 4 <= at <= len(data):
            break
        if marker == 0xDB and len(segment) % 65 == 0:
            quantizers.update(segment[::65])
        elif marker == 0xC4:
            while segment:
                size = 17 + sum(segment[1:17])
                if len(segment) < size:
                    return unusual
                huffman[segment[0]], segment = segment[:size], segment[size:]
        elif marker == 0xC0 and not frame and segment[:1] == b"\x08":
            frame = segment
        elif marker == 0xDA and frame:
            return frame, _tables_of(frame, segment, huffman, quantizers), at
        elif marker == 0xE0 and segment[:5] == b"JFIF\0":
            if segment[5:6] != b"\x01":
                break
        elif marker == 0xEE and segment[:5] == b"Adobe":
            if segment[11:12] not in (b"\x00", b"\x01"):
                break
        elif marker == 0xE2 and segment[:12] == b"ICC_PROFILE\0":  # which libjpeg-turbo puts together
            profiles += 1
            if segment[12:14] != b"\x01\x01" or len(segment) == 14 or profiles > 1:
                break
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            break
    return unusual


def _tables_of(frame: bytes, scan: bytes, huffman: dict[int, bytes], quantizers: set[int]) -> list[Codes]:
    """The Huffman codes of each component, if one usual scan has all of them; none otherwise."""
    ids, sampling, chosen = frame[6::3], frame[7::3], scan[2:-3:2]
    usual = (
        len(frame) == 6 + 3 * frame[5]
        and (sampling == b"\x11" or sampling in _SAMPLING)
        and len(set(ids)) == len(ids)
        and all(0 < int.from_bytes(frame[i : i + 2]) <= 65500 for i in (1, 3))  # libjpeg's bounds
        and set(frame[8::3]) <= quantizers <= {0, 1, 2, 3}
        and huffman.keys() <= {0, 1, 2, 3, 16, 17, 18, 19}
        and scan[:1] == frame[5:6]
        and len(scan) == 4 + 2 * frame[5]
        and scan[1:-3:2] == ids
        and scan[-3:] == b"\0\x3f\0"
        and all(which >> 4 in huffman and 16 | which & 15 in huffman for which in chosen)
    )
    return [(huffman[which >> 4], huffman[16 | which & 15]) for which in chosen] if usual else []


@lru_cache(maxsize=32)  # most JPEGs of an encoder share them
def _tables(*codes: Codes) -> tuple[NDArray[np.uint16], NDArray[np.uint16]] | None:
    """The entries of 13 bits, for as many symbols as these hold, and of 16 bits, for one; None for forbidden tables.

    They are [n, 2, 8192] and [n, 2, 65536] for n codes: what begins with a DC symbol, and what does not.
    """
    chained, single = np.zeros((len(codes), 2, _LOOKS), np.uint16), np.zeros((len(codes), 2, 1 << 16), np.uint16)
    for code, *tables in zip(codes, chained, single, strict=True):
        if not _run(_fill, tuple(np.frombuffer(table, np.uint8) for table in code), *tables):
            return None
    return chained, single


def _fill(specs: Any, chained: Any, single: Any) -> bool:
    for table in range(2):
        code, at = 0, 17
        for length in range(1, 17):
            if code + specs[table][length] >= 1 << length:  # libjpeg takes no code that is all ones either
                return False
            for _ in range(specs[table][length]):
                symbol = specs[table][at]
                run, extra = symbol >> 4, symbol & 15
                steps = run + 1
                if table == 0 and symbol > 11:
                    return False
                if table == 1 and extra == 0:
                    steps = _END if run == 0 else 16 if run == 15 else 0
                if steps > 0:  # those that mean nothing in a baseline JPEG stay unknown
                    single[table, code << 16 - length : code + 1 << 16 - length] = steps << 5 | length + extra
                code, at = code + 1, at + 1
            code <<= 1
    for table in range(2):
        for look in range(_LOOKS):
            bits, steps = 0, 0
            while steps < _END:
                entry = single[min(table + steps, 1), (look << 16 - _LOOK + bits) & 0xFFFF]
                if entry == 0 or bits + (entry & _BITS) > _LOOK:
                    break
                bits, steps = bits + (entry & _BITS), steps + (entry >> 5)
            chained[table, look] = steps << 5 | bits if bits else _LONG << 5
    return True


def _walk(data: Any, start: int, mcus: int, plan: Any, chained: Any, single: Any) -> bool:
    """Whether all blocks can be followed to their end, and the end of the image comes right after it."""
    # The next bits from the top, how many there are, and the next byte; unsigned, since a negative index costs a test.
    buffer, held, at = np.uint64(0), np.int64(0), np.uint64(start)
    one, two, three, size = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(len(data))
    for _ in range(mcus):
        for which in plan:
            k = np.int64(0)  # coefficients of this block so far
            while k < 64:
                if held < 32:  # a symbol has 31 at most
                    word, plain = np.uint64(0), False
                    if at + three < size:
                        word = np.uint64(data[at]) << np.uint64(24) | np.uint64(data[at + one]) << np.uint64(16)
                        word |= np.uint64(data[at + two]) << np.uint64(8) | np.uint64(data[at + three])
                        plain = (~word - np.uint64(0x01010101)) & word & np.uint64(0x80808080) == 0  # no 0xFF
                    if plain:
                        buffer |= word << np.uint64(32 - held)
                        held, at = held + 32, at + np.uint64(4)
                    while not plain and held <= 56 and at + one < size:
                        byte = data[at]
                        if byte == 0xFF:
                            if data[at + one] != 0:  # a marker: no more bits
                                break
                            at += one
                        buffer |= np.uint64(byte) << np.uint64(56 - held)
                        held, at = held + 8, at + one
                entry = np.int64(chained[which, min(k, 1), buffer >> np.uint64(64 - _LOOK)])
                after = k + (entry >> 5)
                if 64 < after < _END or after >= _END + 64:  # a long symbol, or some of the next block as well
                    entry = np.int64(single[which, min(k, 1), buffer >> np.uint64(48)])
                    after = k + (entry >> 5)
                    if entry == 0 or 64 < after < _END:
                        return False
                buffer <<= np.uint64(entry & _BITS)
                held -= entry & _BITS
                if held < 0:
                    return False
                k = after
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
        warnings.warn(f"Numba's cache cannot be used, so that each run compiles anew: {error!r}", stacklevel=2)
        _kernels[function] = _unkept[function]
        return _unkept[function](*arguments)
