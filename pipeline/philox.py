"""Random numbers as a function of a counter: any sample of any epoch can be drawn alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over numpy arrays. It is implemented here because numpy offers no vectorised form of it, and does
not promise the same numbers in its next version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_2 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_ROUNDS = 10


def philox(key: int, c0: object, c1: object, c2: object, c3: object) -> NDArray[np.uint64]:
    """Four random 32-bit words for each counter (c0, c1, c2, c3).

    Args:
        key: The seed, taken modulo 2**64.
        c0, c1, c2, c3: Integers or integer arrays below 2**32 that broadcast together.

    Returns:
        uint64 [4, *shape] with values below 2**32, where `shape` is that of the counters.
    """
    counters = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    x0, x1, x2, x3 = np.broadcast_arrays(*counters)
    k0 = key & 0xFFFFFFFF
    k1 = key >> 32 & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIER_0 * x0  # 32 x 32 -> 64 bits, never overflows
        p2 = _MULTIPLIER_2 * x2
        x0 = (p2 >> _SHIFT) ^ x1 ^ np.uint64(k0)
        x1 = p2 & _MASK
        x2 = (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1)
        x3 = p0 & _MASK
        k0 = (k0 + _KEY_STEP_0) & 0xFFFFFFFF
        k1 = (k1 + _KEY_STEP_1) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3))


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words below 2**32 as float64 in the open interval (0, 1)."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32
