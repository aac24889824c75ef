"""The difference of two weights and what is to be known of it, from one read of both."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcore.dispatch import pick
from weightwatch.ops.arguments import FLOATS, expect
from weightwatch.ops.difference_sums import reference

Gains = tuple[Tensor | None, Tensor | None]
"""What the rows of base and of post are scaled by, float32 [rows] each; None for ones."""


class DifferenceSums(NamedTuple):
    """A difference and its sums over rows and over columns."""

    delta: Tensor
    """Δ: float32 [rows, columns]."""
    rows: Tensor
    """float64 [4, rows]: sums of the squares of `g0 base`, of `g1 post` and of Δ, and of the variances of the rounding of `g1 post`."""
    columns: Tensor
    """float64 [2, columns]: sums of the squares of Δ, and of the variances."""
    changed: int
    """How many entries of Δ are not zero."""


def difference_sums(base: Tensor | None, post: Tensor, gains: Gains, rounding: tuple[float, float]) -> DifferenceSums:
    """Return `Δ = g1 post - g0 base` (`g1 post` without a base) and the sums of its squares and of its rounding variances.

    With `rounding` = (smallest, share), the variance of the rounding of a weight w is `(share g1 max(2^floor(log2|w|), smallest))²`:
    see `weightwatch.noise.rounding_variance`. NaN or infinity in a weight makes the squares of its row NaN or infinite.

    Weights are widened to float32, scaled, subtracted (each rounded once, so Δ is the same bits on every back end), and what is summed is
    float64. Reads each weight once and writes 4 bytes for it; fuses what the formula takes about ten passes for. Sums come in an order that
    differs between back ends; of one, they are the same each time.

    >>> found = difference_sums(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 5.0]]), (None, None), (2.0**-126, 0.5))
    >>> found.delta, found.changed, found.rows.tolist()
    (tensor([[0., 1., 2.],
            [0., 0., 4.]]), 3, [[3.0, 3.0], [14.0, 27.0], [5.0, 16.0], [2.25, 4.5]])

    Shapes: `base` and `post` [rows, columns], any strides. Dtypes: float32, bfloat16 or float16, each its own; with float64 the reference
    runs, which subtracts in float64.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit.
    """
    known = *FLOATS, torch.float64
    if post.ndim != 2 or post.dtype not in known or post.is_cuda:
        came = f"post is {post.dtype} {tuple(post.shape)} on {post.device}"
        raise ValueError(f"{came}: expected float32, bfloat16, float16 or float64 [rows, columns] on the CPU")
    if base is not None:
        expect("base", base, tuple(post.shape), post.device, *known)
    for name, gain in zip(("gain of base", "gain of post"), gains, strict=True):
        if gain is not None:
            expect(name, gain, (len(post),), post.device, torch.float32)
    wide = torch.float64 in (post.dtype, post.dtype if base is None else base.dtype)
    chosen = reference if wide else pick(__name__, post)
    return DifferenceSums(*chosen.difference_sums(base, post, gains, rounding))
