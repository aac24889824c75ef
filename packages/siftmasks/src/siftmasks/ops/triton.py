"""What the Triton kernels of several ops share. Their tiles are rows of 32 weights: one word of signs and one of bits per row."""

import triton
import triton.language as tl

from lmcore.random.triton import words
from lmcore.rounding import round_to_bf16

ROWS = tl.constexpr(64)  # a whole number of Philox counters, each of 4 rows


@triton.jit
def tile():
    """Return the first row of this program, and the flat indices [ROWS, 32] of its weights."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    return first, (first + tl.arange(0, ROWS))[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def draw_bits(key, first):
    """Return the bits [ROWS, 32] behind the signs of the rows from `first` on: 0 or 1, int32."""
    return _spread(words(key, first // 4 + tl.arange(0, ROWS // 4)))


@triton.jit
def load_bits(packed, first, size):
    """Return the packed bits [ROWS, 32] of the rows from `first` on, 0 beyond `size` weights: 0 or 1, int32."""
    byte, place = _bytes(first)
    loaded = tl.load(packed + byte, byte * 8 < size, other=0).to(tl.uint32)
    return _spread(tl.sum(loaded << (8 * place), 1))


@triton.jit
def store_bits(bits, packed, first, size):
    """Pack int32 bits [ROWS, 32], 0 beyond `size`, into the bytes of the rows from `first` on."""
    byte, place = _bytes(first)
    word = tl.sum(bits.to(tl.uint32) << tl.arange(0, 32)[None, :].to(tl.uint32), 1)
    tl.store(packed + byte, (word[:, None] >> (8 * place) & 0xFF).to(tl.uint8), byte * 8 < size)


@triton.jit
def widen(x):
    """Return a float as float32, also where the interpreter's own cast would lose subnormal bfloat16 numbers."""
    wide = x.to(tl.float32)
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return wide


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to nearest even, also where the interpreter's own cast would truncate."""
    rounded = x.to(dtype)
    if dtype == tl.bfloat16:
        rounded = round_to_bf16(x)
    return rounded


@triton.jit
def _bytes(first):
    place = tl.arange(0, 4)[None, :].to(tl.uint32)
    return (first + tl.arange(0, ROWS))[:, None] * 4 + place, place


@triton.jit
def _spread(word):
    return (word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32) & 1).to(tl.int32)
