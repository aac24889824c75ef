"""The ledger in single passes: blocks in the first-level cache, integers as uint32 whatever the dtypes."""

import numpy as np
import torch
from numba import njit, prange

from siftmasks.ops.numba import BLOCK, CHUNK, load_floats, load_integers, load_words, raw, store_integers, store_words

ROUNDER = np.float32(2.0**23)
"""Added to a float32 below 2**22, it rounds to an integer, half to even, which the low bits then hold."""


def quantize(task_vector, grid, signed):
    """Return levels, packed bits and how many coordinates saturate and are not finite (their levels mean nothing)."""
    levels = torch.empty_like(task_vector, dtype=grid.level_dtype)
    packed = torch.empty((levels.numel() + 7) // 8, dtype=torch.uint8)
    arguments = raw(task_vector), levels.numel(), np.float32(1 / grid.step), grid.largest, signed, raw(levels), packed.numpy()
    seen = _quantize(*arguments) if levels.numel() > CHUNK else _quantize_chunk(*arguments, 0)
    return levels, packed, int(seen[0]), int(seen[1])


def move(levels, total, count, signs, positive, way):
    """Add (`way` 1) or subtract (-1) levels, in place."""
    arguments = *_ledger(levels, total, count, signs, positive), way
    _move(*arguments) if levels.numel() > CHUNK else _move_chunk(*arguments, 0)


def underflows(levels, total, count, signs, positive):
    """Return at how many coordinates the subtraction of these levels would underflow."""
    arguments = _ledger(levels, total, count, signs, positive)
    return int(_underflows(*arguments) if levels.numel() > CHUNK else _underflows_chunk(*arguments, 0))


def _ledger(levels, total, count, signs, positive):
    bits = raw(None if signs is None else signs.contiguous())[0]
    return raw(levels), levels.numel(), raw(total), raw(count), positive is not None, bits, raw(positive)


@njit(parallel=True, cache=True, nogil=True)
def _quantize(task_vector, size, inverse, largest, signed, levels, packed):
    saturated, not_finite = 0, 0
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        seen = _quantize_chunk(task_vector, size, inverse, largest, signed, levels, packed, chunk * CHUNK)
        saturated += seen[0]
        not_finite += seen[1]
    return saturated, not_finite


@njit(cache=True, nogil=True, error_model="numpy")
def _quantize_chunk(task_vector, size, inverse, largest, signed, levels, packed, start):
    saturated, not_finite = 0, 0
    buffer, level = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    flags, words = np.zeros(BLOCK, np.uint32), np.empty(BLOCK // 32, np.uint32)
    stop, most = min(start + CHUNK, size), np.float32(largest)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        tau = load_floats(task_vector, first, buffer[:count])
        cut, strange = np.int32(0), np.int32(0)
        for i in range(count):
            exact = np.abs(tau[i]) * inverse
            cut += np.int32(exact >= most + np.float32(0.5))
            strange += np.int32(not np.abs(tau[i]) < np.inf)
            level[i] = np.float32(min(exact, most) + ROUNDER).view(np.uint32) & np.uint32(0xFFFF)
            flags[i] = tau[i] > 0 if signed else level[i] > 0
        flags[count:] = 0
        for i in range(len(words)):
            word = np.uint32(0)
            for j in range(32):
                word |= flags[32 * i + j] << np.uint32(j)
            words[i] = word
        store_integers(level[:count], levels, first)
        store_words(words, packed, first)
        saturated += cut
        not_finite += strange
    return saturated, not_finite


@njit(parallel=True, cache=True, nogil=True)
def _move(levels, size, total, count, second, signs, positive, way):
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        _move_chunk(levels, size, total, count, second, signs, positive, way, chunk * CHUNK)


@njit(cache=True, nogil=True)
def _move_chunk(levels, whole, total, count, second, signs, positive, way, start):
    buffers, up, words = np.empty((3, BLOCK), np.uint32), np.empty(BLOCK, np.uint32), np.empty(BLOCK // 32, np.uint32)
    stop, factor = min(start + CHUNK, whole), np.uint32(way)  # -1 is 2**32 - 1: the sums are modulo 2**32
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        level = load_integers(levels, first, buffers[0, :size])
        n, c = load_integers(total, first, buffers[1, :size]), load_integers(count, first, buffers[2, :size])
        for i in range(size):
            n[i] += factor * level[i]
            c[i] += factor * np.uint32(level[i] > 0)
        store_integers(n, total, first)
        store_integers(c, count, first)
        if second:
            p = load_integers(positive, first, buffers[1, :size])
            load_words(signs, first, words)
            _spread(words, up)
            for i in range(size):
                p[i] += factor * level[i] * up[i]
            store_integers(p, positive, first)


@njit(parallel=True, cache=True, nogil=True)
def _underflows(levels, size, total, count, second, signs, positive):
    found = 0
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        found += _underflows_chunk(levels, size, total, count, second, signs, positive, chunk * CHUNK)
    return found


@njit(cache=True, nogil=True)
def _underflows_chunk(levels, whole, total, count, second, signs, positive, start):
    found = 0
    buffers, up, words = np.empty((4, BLOCK), np.uint32), np.empty(BLOCK, np.uint32), np.empty(BLOCK // 32, np.uint32)
    stop = min(start + CHUNK, whole)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        level = load_integers(levels, first, buffers[0, :size])
        n, c = load_integers(total, first, buffers[1, :size]), load_integers(count, first, buffers[2, :size])
        short = np.uint32(0)
        if second:
            p = load_integers(positive, first, buffers[3, :size])
            load_words(signs, first, words)
            _spread(words, up)
            for i in range(size):
                same_sign = p[i] if up[i] else n[i] - p[i]
                short += np.uint32((level[i] > n[i]) | ((level[i] > 0) & (c[i] == 0)) | (level[i] > same_sign))
        else:
            for i in range(size):
                short += np.uint32((level[i] > n[i]) | ((level[i] > 0) & (c[i] == 0)))
        found += short
    return found


@njit(cache=True, nogil=True)
def _spread(words, out):
    for i in range(len(words)):
        word = words[i]
        for j in range(32):
            out[32 * i + j] = word >> np.uint32(j) & np.uint32(1)
