"""The upper end of the singular values of noise, from the sums of its variances."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from weightwatch.ops.arguments import expect


def product_edge(rows: Tensor, columns: Tensor) -> tuple[float, float]:
    """Return the edge E of independent entries with variances r_i c_j / t (t = Σ r = Σ c), and the p that it is reached at.

    a_i = 1 / (E (1 - q r_i)) and b_j = 1 / (E (1 - p c_j)) fulfil the inequalities of `weightwatch.noise` for E² = max(C(p) / q, R(q) / p)
    with C(p) = Σ c_j / (1 - p c_j) / t and R(q) likewise. E is the smallest value in two unknowns, 0 < p < 1 / max c and 0 < q < 1 / max r,
    found on a grid that shrinks around it: an upper bound wherever the search ends, about 1e-4 above the least.

    Takes 3 x 23 passes over both sums, which a compiled loop holds in the cache. Back ends differ by the order of float64 sums.

    >>> edge, _ = product_edge(torch.full((400,), 900.0).double(), torch.full((900,), 400.0).double())
    >>> round(edge, 1)  # √900 + √400
    50.0

    Shapes: `rows` [d] and `columns` [m], positive, neither empty. Dtypes: float64.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit.
    Source: Lehner 1999, "Computing norms of free operators with matrix coefficients", for variances of rank one.
    """
    for name, sums in (("rows", rows), ("columns", columns)):
        expect(name, sums, (max(1, sums.numel()),), torch.device("cpu"), torch.float64)
    edge, p = pick(__name__, rows).product_edge(rows.contiguous(), columns.contiguous())
    return float(edge), float(p)
