"""The interpolation as a formula: the oracle of the Triton kernel, bit for bit."""

from torch import Tensor


def lerp(early: Tensor, late: Tensor, delta: float) -> Tensor:
    """`late + delta * (early - late)` in float32, rounded once to the dtype of `late`."""
    return (late.float() + delta * (early.float() - late.float())).to(late.dtype)
