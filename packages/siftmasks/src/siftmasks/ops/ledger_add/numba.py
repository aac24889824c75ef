"""The ledger in single passes: blocks in the first-level cache, each loop over integers of one width so that it is vectorised.

A caller that has threads of its own sets numba to one thread in each of them (`numba.set_num_threads`): loops then start no others.
"""

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from siftmasks.ops.numba import BLOCK, CHUNK, draw_words, load_floats, load_integers, load_words, raw

ROUNDER = np.float32(2.0**23)
"""Added to a float32 below 2**22, it rounds to an integer, half to even, which the low bits then hold."""
GATHER = np.uint64(0x0102040810204080)
"""The product with 8 bytes of 0 or 1 has these bits, the first byte's lowest, in its upper byte."""


def quantize(weight, base, key, grid, signed):
    """See `reference.quantize`. Each chunk sums for itself: so the sums of squares do not depend on the number of threads."""
    size = weight.numel()
    levels = torch.empty_like(weight, dtype=grid.level_dtype)
    packed, seen = torch.empty((size + 7) // 8, dtype=torch.uint8), np.zeros(((size + CHUNK - 1) // CHUNK, 4))
    given = (base is not None, key is not None, signed)
    arguments = raw(weight), raw(base), given, *(key or (0, 0)), np.float32(1 / grid.step), grid.largest
    outputs = raw(levels), packed.numpy(), seen
    _quantize_span(*arguments, *outputs, 0, size) if _alone(size) else _quantize(*arguments, *outputs, size)
    return levels, packed, seen.sum(0).tolist()


def move(levels, total, count, signs, positive, way):
    """Add (`way` 1) or subtract (-1) levels, in place."""
    arguments, size = (*_ledger(levels, total, count, signs, positive), way), levels.numel()
    _move_span(*arguments, 0, size) if _alone(size) else _move(*arguments, size)


def underflows(levels, total, count, signs, positive):
    """Return at how many coordinates the subtraction of these levels would underflow."""
    arguments, size = _ledger(levels, total, count, signs, positive), levels.numel()
    return int(_underflows_span(*arguments, 0, size) if _alone(size) else _underflows(*arguments, size))


def _alone(size):
    return size <= CHUNK or get_num_threads() == 1


def _ledger(levels, total, count, signs, positive):
    bits = raw(None if signs is None else signs.contiguous())[0]
    return raw(levels), raw(total), raw(count), positive is not None, bits, raw(positive)


@njit(parallel=True, cache=True, nogil=True)
def _quantize(weight, base, given, key0, key1, inverse, largest, levels, packed, seen, size):
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, size)
        _quantize_span(weight, base, given, key0, key1, inverse, largest, levels, packed, seen, start, stop)


@njit(cache=True, nogil=True, error_model="numpy")
def _quantize_span(weight, base, given, key0, key1, inverse, largest, levels, packed, seen, start, stop):
    with_base, with_key, signed = given
    most, words = np.float32(largest), np.empty(CHUNK // 32, np.uint32)
    buffers, tau, kept = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    level, against, flags = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint32), np.zeros(BLOCK, np.uint8)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        if with_key and first % CHUNK == 0:
            draw_words(key0, key1, first, words)
        after = load_floats(weight, first, buffers[0, :count])
        if with_base:
            before = load_floats(base, first, buffers[1, :count])
            for i in range(count):
                tau[i] = after[i] - before[i]
        else:
            for i in range(count):
                tau[i] = after[i]
        cut, strange = np.int32(0), np.int32(0)
        for i in range(count):
            strange += np.int32(not np.abs(tau[i]) < np.inf)
        if with_key:
            _signs_against(words[first % CHUNK // 32 :], against)
            patterns, turned = tau.view(np.uint32), kept.view(np.uint32)
            for i in range(count):
                turned[i] = patterns[i] ^ against[i]
            for i in range(count):  # τ v in the place of τ: only magnitudes are taken from here, and the mask
                kept[i] = max(kept[i], np.float32(0))
        else:
            for i in range(count):
                kept[i] = tau[i]
        for i in range(count):
            exact = np.abs(kept[i]) * inverse
            cut += np.int32(exact >= most + np.float32(0.5))
            level[i] = np.float32(min(exact, most) + ROUNDER).view(np.uint32)
        if signed:
            for i in range(count):
                flags[i] = kept[i] > 0
        else:
            for i in range(count):
                flags[i] = level[i] > 0
        flags[count:] = 0
        _store_levels(level[:count], levels, first)
        _pack(flags, packed, first)
        chunk = seen[first // CHUNK]
        chunk[0] += cut
        chunk[1] += strange
        chunk[2] += _squares(tau[:count])
        chunk[3] += _squares(kept[:count])


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _squares(values):
    total = 0.0
    for i in range(len(values)):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@njit(cache=True, nogil=True)
def _signs_against(words, out):
    """Fill `out`, 32 per word, with the sign bit of a float32 where the bit is 0, else with 0."""
    for i in range(len(out) // 32):
        word = ~words[i]
        for j in range(32):
            out[32 * i + j] = word << np.uint32(31 - j) & np.uint32(0x80000000)


@njit(cache=True, nogil=True)
def _pack(flags, packed, first):
    """Write flags, bytes of 0 or 1, as the bits from flat index `first`, a multiple of 8, on, as far as there are bytes."""
    rows, out = flags.view(np.uint64), packed[first // 8 : first // 8 + len(flags) // 8]
    for i in range(len(out)):
        out[i] = rows[i] * GATHER >> np.uint64(56)


@njit(parallel=True, cache=True, nogil=True)
def _move(levels, total, count, second, signs, positive, way, size):
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, size)
        _move_span(levels, total, count, second, signs, positive, way, start, stop)


@njit(cache=True, nogil=True)
def _move_span(levels, total, count, second, signs, positive, way, start, stop):
    level, part, words = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint16), np.empty(BLOCK // 32, np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        load_integers(levels, first, level[:size])
        _change(total, first, level[:size], way)
        for i in range(size):
            part[i] = level[i] > 0
        _change(count, first, part[:size], way)
        if second:
            load_words(signs, first, words)
            _spread(words, part)
            for i in range(size):
                part[i] *= level[i]
            _change(positive, first, part[:size], way)


@njit(cache=True, nogil=True)
def _change(tensor, first, amounts, way):
    """Add `way` (1 or -1) times the amounts from flat index `first` on, modulo the width of the integers."""
    data, code = tensor
    size, factor = len(amounts), np.uint32(way)
    if code == 5:
        longs = data[4 * first : 4 * (first + size)].view(np.uint32)
        for i in range(size):
            longs[i] += factor * np.uint32(amounts[i])
    elif code == 4:
        shorts = data[2 * first : 2 * (first + size)].view(np.uint16)
        for i in range(size):
            shorts[i] += np.uint16(factor * amounts[i])
    else:
        bytes_ = data[first : first + size]
        for i in range(size):
            bytes_[i] += np.uint8(factor * amounts[i])


@njit(cache=True, nogil=True)
def _store_levels(level, tensor, first):
    data, code = tensor
    size = len(level)
    if code == 4:
        shorts = data[2 * first : 2 * (first + size)].view(np.uint16)
        for i in range(size):
            shorts[i] = level[i]
    else:
        bytes_ = data[first : first + size]
        for i in range(size):
            bytes_[i] = level[i]


@njit(cache=True, nogil=True)
def _spread(words, out):
    for i in range(len(words)):
        word = words[i]
        for j in range(32):
            out[32 * i + j] = word >> np.uint32(j) & np.uint32(1)


@njit(parallel=True, cache=True, nogil=True)
def _underflows(levels, total, count, second, signs, positive, size):
    found = 0
    for chunk in prange((size + CHUNK - 1) // CHUNK):
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, size)
        found += _underflows_span(levels, total, count, second, signs, positive, start, stop)
    return found


@njit(cache=True, nogil=True)
def _underflows_span(levels, total, count, second, signs, positive, start, stop):
    found = 0
    buffers = np.empty((4, BLOCK), np.uint32)
    level, n, c, p = buffers[0], buffers[1], buffers[2], buffers[3]
    up, words = np.empty(BLOCK, np.uint32), np.empty(BLOCK // 32, np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        load_integers(levels, first, level[:size])
        load_integers(total, first, n[:size])
        load_integers(count, first, c[:size])
        short = np.uint32(0)
        if second:
            load_integers(positive, first, p[:size])
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
