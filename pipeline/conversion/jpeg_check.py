"""Checks that an ordinary JPEG is intact without decoding it.

`is_intact` walks over the Huffman codes of all blocks without computing a coefficient. It looks up
several symbols at a time, and so takes about half as long as libjpeg-turbo's decoding to an eighth
of the size. It knows baseline JPEGs of one scan without restart markers; of all others it is not
certain. Huffman codes and segments are those of ITU-T T.81; libjpeg-turbo adds some restrictions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from ..numba_cache import CachedKernel

# Markers of segments, without their first byte 0xFF
_START_OF_FRAME = 0xC0  # of a baseline JPEG
_HUFFMAN_TABLES = 0xC4
_QUANTIZATION_TABLES = 0xDB
_START_OF_SCAN = 0xDA
_APP0, _APP2, _APP14, _APP15 = 0xE0, 0xE2, 0xEE, 0xEF
_COMMENT = 0xFE

_SAMPLING_FACTORS = (  # of the components; the first byte is luma's: 4 bits across, 4 bits down
    b"\x11",
    b"\x11\x11\x11",
    b"\x21\x11\x11",
    b"\x12\x11\x11",
    b"\x22\x11\x11",
)
_LARGEST_SIDE = 65_500  # of an image, in libjpeg
_FULL_SPECTRUM = b"\0\x3f\0"  # coefficients 0 to 63, no successive approximation
_DC, _AC = 0, 1
_AC_CLASS = 16  # in the number of a Huffman table: its upper half is 1 for an AC table
_HUFFMAN_NUMBERS = {0, 1, 2, 3, 16, 17, 18, 19}  # of the tables that a file may have
_COUNTS_END = 17  # a Huffman table: its number, 16 counts of codes by length, then the symbols
_QUANTIZATION_TABLE_BYTES = 65

# An entry of a lookup table is `advance << _ADVANCE_SHIFT | bits`: how many coefficients the
# symbols in it cover, and how many bits they take together.
_ADVANCE_SHIFT = 5
_BITS_MASK = 31
_COEFFICIENTS = 64  # of a block
_END_OF_BLOCK = 256  # is added to `advance` if the block ends with the entry
_TOO_LONG = 128  # stands for `advance` if not even the first symbol fits the table of many symbols
_MANY_BITS = 13  # the AC tables of an image just fit a core's nearest cache, and more was slower
_ONE_BITS = 16  # the longest Huffman code

_KERNEL_OPTIONS = {"nogil": True, "error_model": "numpy"}


class HuffmanCodes(NamedTuple):
    """The Huffman tables of a component as they stand in the file."""

    dc: bytes
    ac: bytes


class _Header(NamedTuple):
    frame: bytes  # contents of the frame's segment
    codes: list[HuffmanCodes]  # one for each component
    scan_start: int  # position of the entropy-coded data


def is_intact(data: bytes) -> bool:
    """Whether a JPEG is certain to decode without an error or a warning of libjpeg-turbo.

    False means that the file is damaged or unusual: only decoding it can tell.
    """
    header = _parse_header(data)
    if header is None:
        return False
    distinct = tuple(dict.fromkeys(header.codes))
    tables = _lookup_tables(distinct)
    if tables is None:
        return False

    height = int.from_bytes(header.frame[1:3])
    width = int.from_bytes(header.frame[3:5])
    across = header.frame[7] >> 4  # luma blocks in an MCU (minimum coded unit)
    down = header.frame[7] & 15
    rows = -(-height // (8 * down))
    columns = -(-width // (8 * across))
    luma, *chroma = (distinct.index(codes) for codes in header.codes)
    blocks = np.array([luma] * (across * down) + chroma)  # of an MCU: the number of their codes
    encoded = np.frombuffer(data, np.uint8)
    return _walk_blocks(encoded, header.scan_start, rows * columns, blocks, *tables)


def _parse_header(data: bytes) -> _Header | None:
    """The segments up to the start of the scan; None for a JPEG that is damaged or unusual."""
    if data[:2] != b"\xff\xd8":
        return None
    segments = _HeaderSegments()
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        length = int.from_bytes(data[at + 2 : at + 4])
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if length < 2 or at > len(data):
            return None
        if marker == _START_OF_SCAN:
            codes = segments.codes_of_scan(segment)
            return None if codes is None else _Header(segments.frame, codes, at)
        if not segments.add(marker, segment):
            return None
    return None


class _HeaderSegments:
    """What the segments of a JPEG have defined so far."""

    def __init__(self) -> None:
        self.frame = b""
        self._huffman: dict[int, bytes] = {}  # by number
        self._quantizers: set[int] = set()  # their numbers
        self._color_profiles = 0

    def add(self, marker: int, segment: bytes) -> bool:
        """Read the contents of a segment; False if they are damaged or unusual."""
        if marker == _QUANTIZATION_TABLES:
            self._quantizers.update(segment[::_QUANTIZATION_TABLE_BYTES])
            return len(segment) % _QUANTIZATION_TABLE_BYTES == 0
        if marker == _HUFFMAN_TABLES:
            return self._add_huffman_tables(segment)
        if marker == _START_OF_FRAME:
            is_first = not self.frame
            self.frame = segment
            return is_first and segment[:1] == b"\x08" and len(segment) in (9, 15)
        if marker == _APP0 and segment[:5] == b"JFIF\0":
            return segment[5:6] == b"\x01"  # major version
        if marker == _APP14 and segment[:5] == b"Adobe":
            return segment[11:12] in (b"\0", b"\x01")  # colour transform: none or YCbCr
        if marker == _APP2 and segment[:12] == b"ICC_PROFILE\0":
            # libjpeg-turbo joins the parts of a profile: here it has to be the first of one part.
            self._color_profiles += 1
            is_one_part = segment[12:14] == b"\x01\x01" and len(segment) > 14
            return is_one_part and self._color_profiles == 1
        return _APP0 <= marker <= _APP15 or marker == _COMMENT

    def _add_huffman_tables(self, segment: bytes) -> bool:
        while segment:
            size = _COUNTS_END + sum(segment[1:_COUNTS_END])
            if len(segment) < size:
                return False
            self._huffman[segment[0]] = segment[:size]
            segment = segment[size:]
        return True

    def codes_of_scan(self, scan: bytes) -> list[HuffmanCodes] | None:
        """The codes of each component if this scan has all of them; None if it is unusual."""
        if not self.frame or not self._is_usual_frame():
            return None
        components = self.frame[5]
        if len(scan) != 4 + 2 * components:
            return None
        ids = self.frame[6::3]
        if (scan[:1], scan[1:-3:2], scan[-3:]) != (self.frame[5:6], ids, _FULL_SPECTRUM):
            return None
        chosen = [(pair >> 4, _AC_CLASS | pair & 15) for pair in scan[2:-3:2]]
        used = {number for pair in chosen for number in pair}
        if not used <= self._huffman.keys() <= _HUFFMAN_NUMBERS:
            return None
        return [HuffmanCodes(self._huffman[dc], self._huffman[ac]) for dc, ac in chosen]

    def _is_usual_frame(self) -> bool:
        ids = self.frame[6::3]
        sides = (int.from_bytes(self.frame[1:3]), int.from_bytes(self.frame[3:5]))
        return (
            len(ids) == len(set(ids)) == self.frame[5]
            and self.frame[7::3] in _SAMPLING_FACTORS
            and all(0 < side <= _LARGEST_SIDE for side in sides)
            and set(self.frame[8::3]) <= self._quantizers <= {0, 1, 2, 3}
        )


@lru_cache(maxsize=32)  # most JPEGs of an encoder share them
def _lookup_tables(
    codes: tuple[HuffmanCodes, ...],
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]] | None:
    """Two lookup tables for each of n codes; None if a code is not allowed.

    Returns:
        many: [n, 2, 2^13], by the next 13 bits: as many symbols as these bits hold.
        one: [n, 2, 2^16], by the next 16 bits: one symbol.
        The second index is 0 if a DC symbol comes first, 1 if an AC symbol does.
    """
    many = np.zeros((len(codes), 2, 1 << _MANY_BITS), np.uint16)
    one = np.zeros((len(codes), 2, 1 << _ONE_BITS), np.uint16)
    for i, pair in enumerate(codes):
        for kind, table in ((_DC, pair.dc), (_AC, pair.ac)):
            if not _fill_one(kind, np.frombuffer(table, np.uint8), one[i, kind]):
                return None
        _fill_many(one[i], many[i])
    return many, one


def _fill_one_python(kind: int, codes: Any, one: Any) -> bool:
    """Fill the table of one symbol for a DC or an AC code; False if the code is not allowed."""
    code = 0
    at = _COUNTS_END
    for length in range(1, _ONE_BITS + 1):
        # libjpeg does not accept a code of ones only either.
        if code + codes[length] >= 1 << length:
            return False
        for _ in range(codes[length]):
            zeros = codes[at] >> 4  # coefficients that are 0 before this one
            extra_bits = codes[at] & 15  # they follow the code and hold the coefficient
            advance = zeros + 1
            if kind == _DC and (zeros > 0 or extra_bits > 11):
                return False
            if kind == _AC and extra_bits == 0:
                # A baseline JPEG has two of these symbols; the others remain unknown.
                if zeros == 0:
                    advance = _END_OF_BLOCK
                elif zeros == 15:
                    advance = 16
                else:
                    advance = 0
            if advance > 0:
                first = code << _ONE_BITS - length
                end = code + 1 << _ONE_BITS - length
                one[first:end] = advance << _ADVANCE_SHIFT | length + extra_bits
            code += 1
            at += 1
        code <<= 1
    return True


def _fill_many_python(one: Any, many: Any) -> None:
    """Fill the tables of many symbols of a component from its tables of one symbol."""
    for kind in range(2):
        for bits in range(1 << _MANY_BITS):
            used = 0
            advance = 0
            while advance < _END_OF_BLOCK:
                next_kind = _DC if kind == _DC and advance == 0 else _AC
                rest = (bits << _ONE_BITS - _MANY_BITS + used) & 0xFFFF
                entry = one[next_kind, rest]
                if entry == 0 or used + (entry & _BITS_MASK) > _MANY_BITS:
                    break
                used += entry & _BITS_MASK
                advance += entry >> _ADVANCE_SHIFT
            if used == 0:
                advance = _TOO_LONG
            many[kind, bits] = advance << _ADVANCE_SHIFT | used


def _walk_blocks_python(  # noqa: C901, PLR0912  # as several functions, it was up to 20 % slower
    data: Any, start: int, mcus: int, blocks: Any, many: Any, one: Any
) -> bool:
    """Whether all blocks can be followed to their end, and the image ends right after them.

    Args:
        data: The file, uint8.
        start: Where its entropy-coded data begin.
        mcus: Number of MCUs.
        blocks: For each block of an MCU, the index of its codes in the tables.
        many, one: See `_lookup_tables`.
    """
    buffer = uint64(0)  # the next bits, from the top
    held = 0  # how many bits are in it
    at = uint64(start)  # of the next byte; unsigned, since a negative index would cost a test
    size = uint64(len(data))
    for _ in range(mcus):
        for codes in blocks:
            position = 0  # of the next coefficient in this block
            kind = _DC
            while position < _COEFFICIENTS:
                if held < 32:  # refill it: a symbol and its extra bits are 31 at most
                    word = uint64(0xFF)
                    if at + uint64(3) < size:
                        word = uint64(data[at]) << uint64(24)
                        word |= uint64(data[at + uint64(1)]) << uint64(16)
                        word |= uint64(data[at + uint64(2)]) << uint64(8)
                        word |= uint64(data[at + uint64(3)])
                    no_byte_is_ff = (~word - uint64(0x01010101)) & word & uint64(0x80808080) == 0
                    if no_byte_is_ff:
                        buffer |= word << uint64(32 - held)
                        held += 32
                        at += uint64(4)
                    else:
                        while held <= 56 and at + uint64(1) < size:
                            byte = uint64(data[at])
                            if byte == 0xFF:
                                if data[at + uint64(1)] != 0:  # a marker: no more bits
                                    break
                                at += uint64(1)  # a 0 is stuffed in after each 0xFF
                            buffer |= byte << uint64(56 - held)
                            held += 8
                            at += uint64(1)
                entry: Any = np.int64(many[codes, kind, buffer >> uint64(64 - _MANY_BITS)])
                after = position + (entry >> _ADVANCE_SHIFT)
                # If the first symbol is too long for this table, or some symbols are of the next
                # block, look up the first symbol alone.
                if _COEFFICIENTS < after < _END_OF_BLOCK or after >= _END_OF_BLOCK + _COEFFICIENTS:
                    entry = np.int64(one[codes, kind, buffer >> uint64(64 - _ONE_BITS)])
                    after = position + (entry >> _ADVANCE_SHIFT)
                    if entry == 0 or _COEFFICIENTS < after < _END_OF_BLOCK:
                        return False
                buffer <<= uint64(entry & _BITS_MASK)
                held -= entry & _BITS_MASK
                position = after
                kind = _AC
            if held < 0:  # a marker, or the end of the file, came first
                return False
    ends_in_marker = at + uint64(1) < size and data[at] == 0xFF and data[at + uint64(1)] == 0xD9
    return bool(held < 8 and ends_in_marker)


_fill_one = CachedKernel(_fill_one_python, _KERNEL_OPTIONS)
_fill_many = CachedKernel(_fill_many_python, _KERNEL_OPTIONS)
_walk_blocks = CachedKernel(_walk_blocks_python, _KERNEL_OPTIONS)
