"""Where the singular values of noise end: of rounding errors, and of entries that have nothing to do with each other.

The singular values of a large matrix of independent errors with variances s_ij fill an interval. Its upper end, the edge, is the smallest E
for which there are positive a [d] and b [m] with

    1/a_i + Σ_j s_ij b_j <= E      and      1/b_j + Σ_i s_ij a_i <= E.

So any positive a and b give an upper bound, and a few steps of a = 1/(E - S b), b = 1/(E - Sᵀ a) at an E that is large enough give one
that is hardly above the edge. Equal variances s give √s (√d + √m), the edge of Marchenko and Pastur. A single matrix of finite size
scatters about the edge by the law of Tracy and Widom: the functions here add six units of it, which one in 500,000 exceeds.

Source: Lehner 1999, "Computing norms of free operators with matrix coefficients"; Bandeira, Boedihardjo and van Handel 2021
(arXiv 2108.06312) for matrices of finite size; Johnstone 2001 for the scatter.
"""

import torch
from torch import Tensor

from weightwatch.ops.product_edge import product_edge
from weightwatch.singular import SingularVectors

_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_SMALLEST = {torch.float64: -1022, torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}  # exponents of normal numbers
_PIECE = 1 << 18  # weights that are looked at before it is known whether they all need be
_FACTORS = (1.0, 1.01, 1.02, 1.03, 1.045, 1.06, 1.08, 1.1, 1.12, 1.15, 1.18, 1.22, 1.28, 1.4, 1.6, 2.0)


def rounding(stored: Tensor) -> tuple[float, float]:
    """How weights were rounded: the smallest normal number of their dtype, and the deviation of the error in units of 2^floor(log2|w|).

    A float32 tensor whose values all fit bfloat16 or float16 was rounded to that.
    """
    dtype = _rounded_to(stored)
    return 2.0 ** _SMALLEST[dtype], 2.0 ** -_MANTISSA_BITS[dtype] / 12**0.5


def rounding_variance(stored: Tensor, how: tuple[float, float] | None = None) -> Tensor:
    """Variance of the rounding error of each weight as stored, float32 of the same shape: ulp² / 12, that of an even spread over an ulp.

    An ulp is the distance of neighbouring numbers of the dtype, 2^-7 of the power of two below the weight for bfloat16. `how` is
    `rounding(stored)` if not given. It is an upper bound for weights that a fine-tune left as they were, whose base lay on the same grid:
    their error is the change that rounding swallowed.

    >>> rounding_variance(torch.tensor([1.0, 1.5, 4.0], dtype=torch.bfloat16)).mul(12).sqrt() * 2**7
    tensor([1., 1., 4.])
    """
    smallest, share = how or rounding(stored)
    power = (stored.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2|w|)
    return power.clamp_(min=smallest).mul_(share).square_()


def edge_of_sums(rows: Tensor, columns: Tensor) -> float:
    """The edge of independent errors, known by the sums of their variances over each row [d] and each column [m].

    It is that of the variances r_i c_j / t (t the total), which variances with the same sums come close to where they scatter about it
    without order. Of a matrix whose own squares are summed it says how far its singular values would reach if its entries had
    nothing to do with each other.

    For what the sums do not tell, 5 % are added: of 380 matrices of real rounding errors none came nearer than 5 % to it.

    >>> round(edge_of_sums(torch.full((400,), 900.0), torch.full((900,), 400.0)), 1)  # 20 + 30, the scatter and 5 %
    53.9
    """
    rows, columns = rows[rows > 0].double(), columns[columns > 0].double()
    return 1.05 * product_edge(rows, columns)[0] * _scatter(rows, columns) if len(rows) and len(columns) else 0.0


def edge_of_rest(rows: Tensor, columns: Tensor, found: SingularVectors) -> float:
    """`edge_of_sums` of a matrix less its singular vectors that lie beyond it, given the squares of the whole matrix summed.

    Each vector taken out lowers the edge, which may lay bare another, until none is left beyond. Of no row or column less than a millionth
    is left, which is what float32 vectors can tell: the edge of the rest is exact down to a thousandth of that of the whole.
    """
    edge, beyond = edge_of_sums(rows, columns), 0
    energies = [(side * found.values.float()[:, None]).square() for side in (found.left, found.right)]
    while (count := int((found.values > edge).sum())) > beyond:
        rest = [
            torch.maximum(whole - energy[:count].sum(0), 1e-6 * whole)
            for whole, energy in zip((rows, columns), energies, strict=True)
        ]
        edge, beyond = edge_of_sums(*rest), count
    return edge


def bound_of_variances(rows: Tensor, columns: Tensor) -> float:
    """A bound on the edge of independent errors from the sums of their variances over each row [d] and each column [m].

    It is √max r + √max c, which a_i = 1 / √max c and b_j = 1 / √max r give, and the scatter: for rounding errors of real weights 1.1 to 1.4
    times what `edge_of_variances` finds, and never less but for the about 1 % by which that is too large.
    """
    rows, columns = rows[rows > 0], columns[columns > 0]
    return float(rows.max().sqrt() + columns.max().sqrt()) * _scatter(rows, columns) if len(rows) and len(columns) else 0.0


def edge_of_variances(variances: Tensor, at_most: float) -> float:
    """The edge of independent errors with `variances` [d, m], never under it and about 1 % above; or `at_most` where that is smaller.

    Reads the variances 5 times, or twice where the edge of their sums is no smaller than `at_most`.
    """
    sums = variances.sum(1), variances.sum(0)
    rows, columns = (side[side > 0].double() for side in sums)
    if not len(rows):
        return 0.0
    start, p = product_edge(rows, columns)
    if start * _scatter(rows, columns) >= at_most:
        return at_most
    edges = start * torch.tensor(_FACTORS)[:, None]
    b = 1 / (edges * (1 - p * sums[1])).clamp(min=1e-3 * start)
    a = 1 / (edges - b @ variances.mT).clamp(min=1e-3 * start)
    across = a @ variances
    b = 1 / (edges - across).clamp(min=1e-3 * start)
    bounds = torch.maximum((1 / a + b @ variances.mT).amax(1), (1 / b + across).amax(1))
    return min(at_most, float(bounds.min()) * _scatter(rows, columns))


def _scatter(rows: Tensor, columns: Tensor) -> float:
    """How far single matrices get beyond the edge: six units of Tracy and Widom for as many rows and columns as share the variance."""
    n, m = (float(side.sum() ** 2 / side.square().sum()) for side in (rows, columns))
    return 1 + 3 * (n**-0.5 + m**-0.5) ** (1 / 3) / (n**0.5 + m**0.5)


def _rounded_to(stored: Tensor) -> torch.dtype:
    if stored.dtype == torch.float32:
        pieces = stored.split(max(1, _PIECE // max(1, stored[:1].numel())))
        if not any(bool((piece.view(torch.int32) & 0xFFFF).any()) for piece in pieces):
            return torch.bfloat16
        if all(torch.equal(piece.half().float(), piece) for piece in pieces):
            return torch.float16
    return stored.dtype
