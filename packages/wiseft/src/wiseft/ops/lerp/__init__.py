"""Interpolation of two weight tensors in one pass over memory."""

from typing import TYPE_CHECKING

from lmcore.dispatch import pick

if TYPE_CHECKING:
    from torch import Tensor


def lerp(early: "Tensor", late: "Tensor", delta: float) -> "Tensor":
    """Interpolate two weights: `delta * early + (1 - delta) * late`, computed as `late + delta * (early - late)`.

    On a GPU the arithmetic is float32 with a single rounding to the dtype of `late`: within one unit in the last place, counted at the
    larger of the two weights. On a CPU it is float64 with a single rounding to nearest even, the arithmetic of `merge`. Moves
    3 x itemsize bytes per weight; the limit is memory bandwidth.

    >>> lerp(torch.zeros(2, 3), torch.ones(2, 3), 0.25)[0]
    tensor([0.7500, 0.7500, 0.7500])

    Shapes: `early`, `late` and the result are equal, any rank. Dtypes: float32, bfloat16 or float16, each its own.
    Raises: `ValueError` if the shapes differ.
    Source: WiSE-FT, Wortsman et al. 2021, eq. 1 (their alpha is 1 - delta); Dang et al. 2025 take an early checkpoint of the same run.
    """
    if early.shape != late.shape:
        raise ValueError(f"early has shape {tuple(early.shape)}, late has {tuple(late.shape)}: they must be equal")
    return pick(__name__, early, late).lerp(early.contiguous(), late.contiguous(), delta)
