"""The search on a CPU: scalar loops, where tensors of a few thousand numbers cost more in calls than in arithmetic."""

import numpy as np
from numba import njit

from weightwatch.ops.product_edge.reference import POINTS, ROUNDS


def product_edge(rows, columns):
    """See `weightwatch.ops.product_edge`."""
    return _search(rows.numpy(), columns.numpy())


@njit(cache=True, nogil=True, error_model="numpy")
def _search(rows, columns):
    total, top_row, top_column = rows.sum(), rows.max(), columns.max()
    low_p, low_q, high_p, high_q = 0.0, 0.0, 1.0, 1.0
    over_p, over_q = np.empty((2, POINTS - 1))
    for _ in range(ROUNDS):
        step_p, step_q = (high_p - low_p) / POINTS, (high_q - low_q) / POINTS
        for i in range(POINTS - 1):
            over_p[i] = _shares(columns, (low_p + (i + 1) * step_p) / top_column) / total
            over_q[i] = _shares(rows, (low_q + (i + 1) * step_q) / top_row) / total
        least, best_p, best_q = np.inf, 0.0, 0.0
        for i in range(POINTS - 1):
            p = low_p + (i + 1) * step_p
            for j in range(POINTS - 1):
                q = low_q + (j + 1) * step_q
                square = max(over_p[i] / q * top_row, over_q[j] / p * top_column)
                if square < least:
                    least, best_p, best_q = square, p, q
        low_p, high_p = max(best_p - 2 * step_p, 0.0), min(best_p + 2 * step_p, 1.0)
        low_q, high_q = max(best_q - 2 * step_q, 0.0), min(best_q + 2 * step_q, 1.0)
    return np.sqrt(least), best_p / top_column


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _shares(sums, p):
    """Return `Σ s / (1 - p s)`."""
    whole = 0.0
    for i in range(len(sums)):  # which is vectorised, where `for s in sums` is not
        whole += sums[i] / (1 - p * sums[i])
    return whole
