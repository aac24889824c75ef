"""The served weights in one pass: each thread takes a chunk through the first-level cache, block by block."""

import numpy as np
from numba import njit, prange

from siftmasks.ops.numba import (
    BLOCK,
    CHUNK,
    draw_words,
    factors,
    load_floats,
    load_integers,
    load_words,
    place_floats,
    raw,
    store_floats,
)


def apply_mask(base, total, bits, count, positive, key, factor, out):
    """See `siftmasks.ops.apply_mask`; `factor` is the step times the scale."""
    given = (bits is not None, count is not None, positive is not None, key is not None)
    tensors = raw(base), raw(total), raw(bits)[0], raw(count), raw(positive)
    arguments = *tensors, given, *(key or (0, 0)), np.float32(factor), raw(out), out.numel()
    _all(*arguments) if out.numel() > CHUNK else _chunk(*arguments, 0)


@njit(parallel=True, cache=True, nogil=True)
def _all(base, total, bits, count, positive, given, key0, key1, factor, out, size):
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        _chunk(base, total, bits, count, positive, given, key0, key1, factor, out, size, chunk * CHUNK)


@njit(cache=True, nogil=True, error_model="numpy")
def _chunk(base, total, bits, count, positive, given, key0, key1, factor, out, whole, start):
    with_bits, with_count, with_positive, with_key = given
    stop = min(start + CHUNK, whole)
    mask, sign = np.full(CHUNK // 32, 0xFFFFFFFF, np.uint32), np.full(CHUNK // 32, 0xFFFFFFFF, np.uint32)
    words = (stop - start + 127) // 128 * 4
    if with_bits:
        load_words(bits, start, mask[:words] if with_key else sign[:words])
    if with_key:
        draw_words(key0, key1, start, sign[:words])
    integers, signed = np.empty((2, BLOCK), np.uint32), np.empty(BLOCK, np.float32)
    magnitude, buffers = np.empty(BLOCK, np.float32), np.empty((2, BLOCK), np.float32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        n, p = integers[0, :size], integers[1, :size]
        load_integers(total, first, n)
        if with_positive:
            load_integers(positive, first, p)
            for i in range(size):
                magnitude[i] = np.float32(2 * np.int64(p[i]) - np.int64(n[i])) * factor
        else:
            for i in range(size):
                magnitude[i] = np.float32(n[i]) * factor
        if with_count:
            load_integers(count, first, n)
            for i in range(size):
                magnitude[i] = magnitude[i] / np.float32(n[i]) if n[i] > 0 else np.float32(0)
        factors(mask[(first - start) // 32 :], sign[(first - start) // 32 :], signed)
        weight = load_floats(base, first, buffers[0, :size])
        served = place_floats(out, first, buffers[1, :size])  # not the same buffer: that would not be vectorised
        for i in range(size):
            served[i] = weight[i] + signed[i] * magnitude[i]
        store_floats(served, out, first)
