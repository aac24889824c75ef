"""Philox4x32-10 on the CPU without torch. `philox` and `as_normal` are there to be called from other njit loops."""

import numpy as np
from numba import njit

from lmcore.random import DTYPES, normal_table


def fill(out, kind, key, start):
    """Overwrite `out` with the numbers from flat index `start` on."""
    _fill(np.asarray(out), list(DTYPES).index(kind), *key, start, normal_table())  # asarray shares a tensor's memory


@njit(inline="always")  # as source: LLVM sees a call too late to vectorise the loop around it, which is then 8 times slower
def philox(key0, key1, counter):
    """Return the four words of a 64-bit counter."""
    k0, k1, shift = np.uint32(key0), np.uint32(key1), np.uint64(32)
    c0, c1, c2, c3 = np.uint32(counter), np.uint32(np.uint64(counter) >> shift), np.uint32(0), np.uint32(0)
    for _ in range(10):
        p0, p2 = np.uint64(0xD2511F53) * np.uint64(c0), np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1 = np.uint32(np.uint32(p2 >> shift) ^ c1 ^ k0), np.uint32(p2)
        c2, c3 = np.uint32(np.uint32(p0 >> shift) ^ c3 ^ k1), np.uint32(p0)
        k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3


@njit(inline="always")
def as_normal(word, table):
    """Interpolate the `normal_table` at a word."""
    low, high = table[word >> 16], table[(word >> 16) + 1]
    return low + (high - low) * (np.float32(word & 0xFFFF) * np.float32(2**-16))


@njit(cache=True, nogil=True)
def _fill(out, kind, key0, key1, start, table):
    words = np.empty(4096, np.uint32)  # small enough to stay in the first-level cache until converted
    for first in range(-(start % 4), out.size, words.size):
        for i in range(0, words.size, 4):
            words[i], words[i + 1], words[i + 2], words[i + 3] = philox(key0, key1, (start + first + i) // 4)
        piece = out[max(0, first) : first + words.size]
        for i, word in enumerate(words[max(0, -first) :][: piece.size]):
            if kind == 0:
                piece[i] = word
            elif kind == 1:
                piece[i] = np.float32(word >> 8) * np.float32(2**-24)
            else:
                piece[i] = as_normal(word, table)
