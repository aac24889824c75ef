"""The extremes of cosines on a CPU: a chunk of rows is widened, multiplied, scaled and reduced while it is in the cache."""

import numpy as np
import torch
from numba import njit, prange

CHUNK = 1 << 18  # numbers of hidden that are taken at a time: 1 MB of float32, about a second-level cache
STEP = 64  # rows, as in a step of generation, up to which all layers are taken together
FEW = 1 << 21  # products up to which waking the threads would take longer than the work


def cos_minmax(hidden, directions, group, groups):
    """See `weightwatch.ops.cos_minmax`; all tensors have layers."""
    (layers, n, d), k = hidden.shape, directions.shape[1]
    extremes, rows = np.empty((2, layers, groups, k), np.float32), np.full((2, layers, groups, k), -1)
    extremes[0], extremes[1] = np.inf, -np.inf
    units, group = directions.float().numpy(), group.numpy()
    together = max(1, layers) if n <= STEP else 1
    step = chunk_rows(d)
    for layer in range(0, layers, together):
        for first in range(0, n, step):
            chunk = hidden[layer : layer + together, first : first + step].float().contiguous().numpy()
            _reduce(*products_and_norms(chunk, units[layer : layer + together]), group, layer, first, extremes, rows)
    return *torch.from_numpy(extremes), *torch.from_numpy(rows)


def chunk_rows(d):
    """Return how many rows of d numbers to take at a time."""
    return max(STEP, CHUNK // max(1, d))


@njit(parallel=True, cache=True, nogil=True)
def products_and_norms(hidden, units):
    """Return `u·h` [layers, n, k], and `|h|` [layers, n], NaN for a row whose sum of squares is not finite."""
    (layers, n, _), k = hidden.shape, units.shape[1]
    product, norm = np.empty((layers, n, k), np.float32), np.empty((layers, n), np.float32)
    pairs = (n + 1) // 2
    if hidden.size * k <= FEW:
        for task in range(layers * pairs):
            layer, row = task // pairs, task % pairs * 2
            _pair(hidden[layer], units[layer], row, product[layer], norm[layer])
    else:
        for task in prange(layers * pairs):
            layer, row = task // pairs, task % pairs * 2
            _pair(hidden[layer], units[layer], row, product[layer], norm[layer])
    return product, norm


@njit(cache=True, nogil=True)
def cosine(product, norm):
    """Return their quotient: 0 for a row of zeros, NaN for one that is not finite."""
    return product / norm if norm != 0 else np.float32(0)


@njit(cache=True, nogil=True)
def _pair(hidden, units, row, product, norm):
    """Take two rows, so that a direction is loaded for both."""
    other = min(row + 1, len(hidden) - 1)
    for one in range(row, other + 1):
        square = _dots(hidden[one], hidden[one], hidden[one])[0]
        norm[one] = np.sqrt(square) if square < np.inf else np.float32(np.nan)
    for j in range(len(units)):
        product[row, j], product[other, j] = _dots(hidden[row], hidden[other], units[j])


# Sums in any order: they are vectorised, and differ by their rounding from those of other machines, not between numbers of threads.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _dots(a, b, unit):
    first, second = np.float32(0), np.float32(0)
    for i in range(len(unit)):
        first += a[i] * unit[i]
        second += b[i] * unit[i]
    return first, second


@njit(cache=True, nogil=True)
def _reduce(products, norms, group, first_layer, first_row, extremes, rows):
    """Fold the cosines of a chunk into the extremes."""
    layers, n, k = products.shape
    for layer in range(first_layer, first_layer + layers):
        for row in range(first_row, first_row + n):
            g = group[row]
            if g < 0:
                continue
            for j in range(k):
                c = cosine(products[layer - first_layer, row - first_row, j], norms[layer - first_layer, row - first_row])
                if c < extremes[0, layer, g, j] or (np.isnan(c) and not np.isnan(extremes[0, layer, g, j])):
                    extremes[0, layer, g, j], rows[0, layer, g, j] = c, row
                if c > extremes[1, layer, g, j] or (np.isnan(c) and not np.isnan(extremes[1, layer, g, j])):
                    extremes[1, layer, g, j], rows[1, layer, g, j] = c, row
