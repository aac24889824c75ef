"""The least and the greatest cosine of each direction over the tokens of a group, from one read of the hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmcore.dispatch import pick
from weightwatch.ops.arguments import FLOATS, expect, expect_below


class CosineRange(NamedTuple):
    """Per group and direction, [groups, k] or [layers, groups, k]; a group without rows has low +inf, high -inf and both rows -1."""

    low: Tensor
    """float32: the least cosine."""
    high: Tensor
    """float32: the greatest cosine."""
    low_at: Tensor
    """int64: the row of the least cosine, the first of equals."""
    high_at: Tensor
    """int64: the row of the greatest cosine, the first of equals."""


def cos_minmax(hidden: Tensor, directions: Tensor, group: Tensor, groups: int) -> CosineRange:
    """Return min and max over the rows t of each group of `c_tj = u_j·h_t / |h_t|`, and the rows that hold them.

    `group` says which group a row belongs to (such as an input and a role), -1 that it is left out; with layers it holds for each of
    them. Directions u_j are unit rows: their length is not looked at, and a zero row has cosine 0 with everything.

    A row is not finite if its sum of squares in float32 is not: NaN, infinity, or numbers beyond about 1e19. Its cosines are NaN, and NaN
    is below and above every number: low and high of its group are NaN, at the first such row. So it is seen, whatever the other rows
    hold. A row of zeros has cosine 0.

    Reads each hidden number once and the directions once per tile of rows; takes 2 (k + 1) FLOPs per hidden number. A GPU is bound by
    memory bandwidth for 16-bit tensors of one dtype, which go to tensor cores, and by float32 arithmetic otherwise. Fuses norm, product,
    scaling and both reductions: no normalised copy is made, and the cosines of all rows are never in memory, on a CPU those of a chunk.
    On a GPU, value and row are packed into one 64-bit integer, of which an atomic minimum keeps the better. Sums are float32, in an
    order that differs between back ends: cosines agree to about 1e-6, and of rows closer than that either may be named. On one device
    the result is the same each time.

    >>> hidden = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 0.0]])
    >>> found = cos_minmax(hidden, torch.eye(2), torch.tensor([0, 0, -1]), 1)
    >>> found.low, found.high, found.low_at
    (tensor([[ 0., -1.]]), tensor([[0.6000, 0.8000]]), tensor([[1, 1]]))

    Shapes: `hidden` [n, d], `directions` [k, d] and results [groups, k]; or `hidden` [layers, n, d], `directions` [layers, k, d] and
    results [layers, groups, k], in one call. `group` [n]; any strides. Dtypes: `hidden` and `directions` float32, bfloat16 or float16 each
    (float32 directions cost a CPU no conversion), `group` int64.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit, or for a group outside [-1, groups). On a GPU, where
    looking at the groups would wait for them, rows of such a group are left out.
    Source: the monitor of WeightWatch, Zhong and Raghunathan 2025 (arXiv 2508.00161).
    """
    if hidden.ndim not in (2, 3) or hidden.dtype not in FLOATS or directions.ndim != hidden.ndim:
        came = f"hidden is {hidden.dtype} {tuple(hidden.shape)}, directions {tuple(directions.shape)}"
        raise ValueError(f"{came}: expected float32, bfloat16 or float16 [n, d] and [k, d], or both with layers before")
    n, d = hidden.shape[-2:]
    expect("directions", directions, (*hidden.shape[:-2], directions.shape[-2], d), hidden.device, *FLOATS)
    expect("group", group, (n,), hidden.device, torch.int64)
    expect_below("group", group, groups, least=-1)
    layered = hidden.ndim == 3
    with torch.no_grad():
        tensors = [tensor.detach().contiguous() for tensor in (hidden, directions)]
        pair = tensors if layered else [tensor[None] for tensor in tensors]
        found = pick(__name__, hidden).cos_minmax(*pair, group.contiguous(), groups)
    return CosineRange(*(part if layered else part[0] for part in found))
