"""Random numbers as a function of a counter, so that any sample of any epoch can be drawn alone and in any order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over numpy arrays.
It is written here because numpy offers no vectorised form and promises no stable stream across its versions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(key: int, c0: object, c1: object, c2: object, c3: object) -> NDArray[np.uint64]:
    """Four 32-bit words for each counter.

    `key` is taken modulo 2**64; `c0`..`c3` are integers or integer arrays below 2**32 that broadcast together.
    Returns uint64 [4, *shape] with values below 2**32.
    """
    x0, x1, x2, x3 = np.broadcast_arrays(
        *(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    )
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2  # 32 x 32 -> 64 bits, never overflows
        x0, x1 = (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0), p1 & _MASK
        x2, x3 = (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1), p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3))


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words below 2**32 as float64 in the open interval (0, 1)."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32
