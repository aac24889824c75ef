"""The arithmetic of `numba`, bit for bit, in passes of NumPy: slower per weight, but there at once (importing numba takes a second)."""

import numpy as np

BLOCK = 32768  # weights at a time: the float64 buffers of a block stay within a core's cache
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}
"""How the weights of each dtype that can be mixed lie in memory: 16-bit floats as their bits."""


def decode(bits: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Weights of a checkpoint dtype (see BITS) as float64, exactly."""
    with np.errstate(invalid="ignore"):
        if dtype == "BF16":
            out[:] = (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            out[:] = bits.view(np.float16) if dtype == "F16" else bits


def mix(early: np.ndarray, late: np.ndarray, delta: float, out: np.ndarray) -> None:
    """`out = late + delta * (early - late)` in float64; `out` is neither of the two."""
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(early, late, out=out)
        out *= delta
        out += late


def add_scaled(total: np.ndarray, weights: np.ndarray, factor: float) -> None:
    """`total += factor * weights` in float64: the sum behind a soup."""
    with np.errstate(invalid="ignore", over="ignore"):
        total += factor * weights


def encode(values: np.ndarray, dtype: str, out: np.ndarray) -> bool:
    """Round float64 values to nearest even into `out` (see BITS). True if one of them is not finite, or not any more."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if dtype == "BF16":
            single = values.astype(np.float32)
            bits = single.view(np.uint32)
            # Where float32 lies halfway between two bfloat16 numbers, and only there, rounding twice can err: the double was beside it.
            halfway = np.flatnonzero((bits & 0xFFFF) == 0x8000)
            there, exact = np.abs(single[halfway].astype(np.float64)), np.abs(values[halfway])
            bits[halfway] += exact > there
            bits[halfway] -= exact < there
            out[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            out[np.isnan(single)] = 0x7FC0
            return bool(((out & 0x7F80) == 0x7F80).any())
        numbers = out.view(np.float16) if dtype == "F16" else out
        numbers[:] = values
        return not np.isfinite(numbers).all()
