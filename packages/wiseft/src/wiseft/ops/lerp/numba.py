"""Float64 arithmetic on raw checkpoint bytes, rounded once: decode a block, mix it, encode it, all within the cache.

Checkpoints on disk are merged with these (numpy only, so that merging never imports torch). A double that goes through float32 on its way
to bfloat16 rounds twice; here the bits of the double are rounded to nearest even directly.
"""

import numpy as np
from numba import njit

from wiseft.ops.lerp.numpy import BLOCK

TOO_LARGE_BF16, TOO_LARGE_F16 = (2 - 2.0**-8) * 2.0**127, 65520.0  # from here on, rounding gives infinity


def lerp(early, late, delta):
    """Interpolate two contiguous CPU tensors: float64 arithmetic, one rounding to the dtype of `late`."""
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    raw = {2: torch.uint16, 4: torch.float32, 8: torch.float64}
    out = torch.empty_like(late)
    a, b, c = (tensor.detach().view(-1).view(raw[tensor.element_size()]).numpy() for tensor in (early, late, out))
    wide_early, wide_late = np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, len(c), BLOCK):
        block = slice(start, start + BLOCK)
        count = len(c[block])
        decode(a[block], names[early.dtype], wide_early[:count])
        decode(b[block], names[late.dtype], wide_late[:count])
        mix(wide_early[:count], wide_late[:count], delta, wide_early[:count])
        encode(wide_early[:count], names[late.dtype], c[block])
    return out


def decode(bits: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Weights of a checkpoint dtype (see `numpy.BITS`) as float64, exactly."""
    {"BF16": _decode_bf16, "F16": _decode_f16, "F32": _widen, "F64": _widen}[dtype](bits, out)


@njit(cache=True, nogil=True)
def mix(early, late, delta, out):
    """`out = late + delta * (early - late)` in float64; `out` may be one of the two."""
    for i in range(len(out)):
        out[i] = late[i] + delta * (early[i] - late[i])


@njit(cache=True, nogil=True)
def add_scaled(total, weights, factor):
    """`total += factor * weights` in float64: the sum behind a soup."""
    for i in range(len(total)):
        total[i] += factor * weights[i]


def encode(values: np.ndarray, dtype: str, out: np.ndarray) -> bool:
    """Round float64 values to nearest even into `out` (see `numpy.BITS`). True if one of them is not finite, or not any more."""
    return {"BF16": _encode_bf16, "F16": _encode_f16, "F32": _narrow, "F64": _narrow}[dtype](values, out)


@njit(cache=True, nogil=True)
def _decode_bf16(bits, out):
    for i in range(len(bits)):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)


@njit(cache=True, nogil=True)
def _decode_f16(bits, out):
    for i in range(len(bits)):
        half = np.uint32(bits[i])
        magnitude = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
        # 2**112 moves the exponent from bias 15 to bias 127 and makes subnormals normal, both exactly
        value = np.float64(magnitude.view(np.float32)) * 2.0**112
        if magnitude >= np.uint32(0x7C00 << 13):
            value = np.inf if magnitude == np.uint32(0x7C00 << 13) else np.nan
        out[i] = -value if half >> np.uint32(15) else value


@njit(cache=True, nogil=True)
def _widen(bits, out):
    for i in range(len(bits)):
        out[i] = bits[i]


@njit(inline="always")
def _round(value, mantissa, bias):
    """The low 16 bits hold `value` rounded to nearest even in a format of 1 + exponent + `mantissa` bits with that exponent bias."""
    drop = np.uint64(52 - mantissa)
    bits = np.float64(value).view(np.uint64)
    sign = (bits >> np.uint64(63)) << np.uint64(15)
    magnitude = bits & np.uint64(0x7FFF_FFFF_FFFF_FFFF)
    infinity = np.uint64((2 * bias + 1) << mantissa)
    odd = (magnitude >> drop) & np.uint64(1)
    normal = (magnitude + (np.uint64(1) << (drop - np.uint64(1))) - np.uint64(1) + odd) >> drop
    normal = normal - np.uint64((1023 - bias) << mantissa)
    # below the smallest normal number the spacing is fixed: adding a constant with that unit in the last place rounds to it
    anchor = 1.5 * 2.0 ** (53 - mantissa - bias)
    subnormal = np.float64(np.abs(value) + anchor).view(np.uint64) - np.float64(anchor).view(np.uint64)
    rounded = normal if np.abs(value) >= 2.0 ** (1 - bias) else subnormal
    rounded = min(rounded, infinity)
    return np.uint16(sign | (rounded if value == value else infinity | np.uint64(1 << (mantissa - 1))))


@njit(cache=True, nogil=True)
def _encode_bf16(values, out):
    strange = 0
    for i in range(len(values)):
        out[i] = _round(values[i], 7, 127)
        strange += not np.abs(values[i]) < TOO_LARGE_BF16
    return strange > 0


@njit(cache=True, nogil=True)
def _encode_f16(values, out):
    strange = 0
    for i in range(len(values)):
        out[i] = _round(values[i], 10, 15)
        strange += not np.abs(values[i]) < TOO_LARGE_F16
    return strange > 0


@njit(cache=True, nogil=True)
def _narrow(values, out):
    strange = 0
    for i in range(len(values)):
        out[i] = values[i]
        strange += not np.abs(out[i]) < np.inf
    return strange > 0
