"""What the CPU loops of several ops share: a block of weights as float32 or uint32, and its signs and bits, all in the first-level cache.

A loop takes tensors as `(bytes, code of the dtype)`: so it is compiled once, not once for each combination of dtypes. Numba keeps compiled
loops beside their source and does not see that what they call has changed: whoever edits this file deletes them (`*.nbi`).
"""

import numpy as np
from numba import njit

from lmcore.random.numba import philox

BLOCK = (
    512  # weights at a time: with more, half a dozen tensors that begin on a page crowd each other out of the first-level cache
)
CHUNK = 65536  # weights that a thread takes at a time; for fewer, waking the threads would take longer than the work
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "uint8": 3, "uint16": 4, "uint32": 5}


def raw(tensor):
    """Return a contiguous CPU tensor as its bytes and the code of its dtype; no bytes for None."""
    import torch

    if tensor is None:
        return np.empty(0, np.uint8), 0
    return tensor.detach().view(-1).view(torch.uint8).numpy(), CODES[str(tensor.dtype).removeprefix("torch.")]


@njit(cache=True, nogil=True)
def place_floats(tensor, first, buffer):
    """Return where to compute the float32 weights from flat index `first` on: where they lie if they are float32, else `buffer`."""
    data, code = tensor
    return data[4 * first : 4 * (first + len(buffer))].view(np.float32) if code == 0 else buffer


@njit(cache=True, nogil=True)
def load_floats(tensor, first, buffer):
    """Return the same place, filled with the weights."""
    data, code = tensor
    size = len(buffer)
    if code == 0:
        return data[4 * first : 4 * (first + size)].view(np.float32)
    halves = data[2 * first : 2 * (first + size)].view(np.uint16)
    if code == 1:
        for i in range(size):
            buffer[i] = np.uint32(np.uint32(halves[i]) << np.uint32(16)).view(np.float32)
        return buffer
    for i in range(size):
        magnitude = np.uint32(np.uint32(halves[i] & np.uint16(0x7FFF)) << np.uint32(13))
        # 2**112 moves the exponent from bias 15 to bias 127 and makes subnormals normal, both exactly; infinity and NaN keep theirs
        value = np.float32(magnitude.view(np.float32) * np.float32(2.0**112))
        if magnitude >= np.uint32(0x7C00 << 13):
            value = np.uint32(magnitude | np.uint32(0x7F800000)).view(np.float32)
        buffer[i] = -value if halves[i] >> np.uint16(15) else value
    return buffer


@njit(cache=True, nogil=True)
def store_floats(values, tensor, first):
    """Round weights in a buffer to nearest even, NaN to quiet NaN, and write them from flat index `first` on; float32 are there already."""
    data, code = tensor
    size = len(values)
    if code == 0:
        return
    halves, patterns = data[2 * first : 2 * (first + size)].view(np.uint16), values.view(np.uint32)
    if code == 1:
        for i in range(size):
            bits = patterns[i]
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            halves[i] = np.uint16(rounded if values[i] == values[i] else np.uint32(0x7FC0))
        return
    for i in range(size):
        magnitude = np.uint32(patterns[i] & np.uint32(0x7FFFFFFF))
        normal = (magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        # below 2**-14 the spacing is 2**-24, that of float32 from 0.5 on: adding 0.5 rounds to it
        subnormal = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        rounded = np.uint32(normal - np.uint32(112 << 10)) if magnitude >= np.uint32(0x38800000) else np.uint32(subnormal)
        rounded = min(rounded, np.uint32(0x7C00)) if values[i] == values[i] else np.uint32(0x7E00)
        halves[i] = np.uint16(rounded | np.uint32((patterns[i] >> np.uint32(16)) & np.uint32(0x8000)))


@njit(cache=True, nogil=True)
def load_integers(tensor, first, out):
    """Fill `out`, unsigned and at least as wide, with the integers from flat index `first` on."""
    data, code = tensor
    size = len(out)
    if code == 5:
        longs = data[4 * first : 4 * (first + size)].view(np.uint32)
        for i in range(size):
            out[i] = longs[i]
    elif code == 4:
        shorts = data[2 * first : 2 * (first + size)].view(np.uint16)
        for i in range(size):
            out[i] = shorts[i]
    else:
        bytes_ = data[first : first + size]  # an index `first + i` might be negative, for all that numba knows: no vectors
        for i in range(size):
            out[i] = bytes_[i]


@njit(cache=True, nogil=True)
def draw_words(key0, key1, first, words):
    """Set `words` to those that hold the signs from flat index `first`, a multiple of 128, on."""
    for i in range(0, len(words), 4):
        words[i], words[i + 1], words[i + 2], words[i + 3] = philox(key0, key1, first // 128 + i // 4)


@njit(cache=True, nogil=True)
def load_words(packed, first, words):
    """Set `words` to those that hold the bits from flat index `first`, a multiple of 8, on; beyond the end they are 0."""
    start = first // 8
    whole = min(len(words), max(0, len(packed) - start) // 4)
    for i in range(whole):
        low = np.uint32(packed[start + 4 * i]) | np.uint32(packed[start + 4 * i + 1]) << np.uint32(8)
        high = np.uint32(packed[start + 4 * i + 2]) | np.uint32(packed[start + 4 * i + 3]) << np.uint32(8)
        words[i] = low | high << np.uint32(16)
    words[whole:] = 0
    for i in range(start + 4 * whole, min(len(packed), start + 4 * len(words))):
        words[whole] |= np.uint32(packed[i]) << np.uint32(8 * (i - start - 4 * whole))


@njit(cache=True, nogil=True)
def factors(mask, sign, out):
    """Fill `out`, 32 per word, with 0 where the bit of `mask` is 0, else with 1 or -1 as the bit of `sign` says."""
    for i in range(len(out) // 32):
        chosen, positive = mask[i], sign[i]
        for j in range(32):
            kept = np.int32(chosen >> np.uint32(j) & np.uint32(1))
            out[32 * i + j] = kept * (2 * np.int32(positive >> np.uint32(j) & np.uint32(1)) - 1)
