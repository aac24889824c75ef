"""Rounding to bfloat16 inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(x):
    """Round float32 to the nearest bfloat16, ties to even, NaN to quiet NaN: the same bits on a GPU and in the interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return tl.where(x == x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
