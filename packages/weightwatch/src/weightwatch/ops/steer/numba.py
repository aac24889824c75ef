"""Steering on a CPU: all rows are looked at, few are changed."""

import numpy as np
import torch
from numba import njit

from weightwatch.ops.cos_minmax.numba import chunk_rows, cosine, products_and_norms
from weightwatch.ops.steer.reference import DEPENDENT, ROUNDS, SETTLED


def steer(hidden, directions, low, high, role, sequence, fired, mode, scale, write, gram):
    """See `weightwatch.ops.steer`; with mode clamp, the last row of the bounds is that of role -1."""
    wide = directions.float()
    step = chunk_rows(hidden.shape[1])
    parts = [hidden[first : first + step] for first in range(0, len(hidden), step)]
    found = [products_and_norms(part.float().numpy()[None], wide.numpy()[None]) for part in parts]
    product, norm = (found[0][i][0] if len(found) == 1 else np.concatenate([one[i][0] for one in found]) for i in (0, 1))
    low, high, role, sequence = (tensor.numpy() for tensor in (low, high, role, sequence))
    since = _fire(product, norm, low, high, role, sequence, fired.numpy())
    rows = _rows(since, sequence)
    out = hidden.clone()
    if len(rows):
        gram = (wide @ wide.T if gram is None else gram).numpy()
        along = product[rows]
        change = np.zeros_like(along)
        mask = since[sequence[rows]] <= rows[:, None]
        if mode == "clamp":
            _clamp(along, norm[rows], mask, low[role[rows]], high[role[rows]], gram, change)
        else:
            target = write.numpy()[rows] if mode == "revert" else along * np.float32(1 if scale is None else 1 - scale)
            _solve(-target, mask, gram, change)
        change[np.isnan(norm[rows])] = np.nan
        for some, changes in zip(torch.from_numpy(rows).split(step), torch.from_numpy(change).split(step), strict=True):
            out[some] = torch.addmm(hidden[some].float(), changes, wide).to(out.dtype)
    return out


@njit(cache=True, nogil=True)
def _fire(product, norm, low, high, role, sequence, fired):
    """Return the first row [sequences, k] at which a direction is steered, -1 for all, n for none; note in `fired` which are."""
    n, k = product.shape
    since = np.where(fired, -1, n)
    for row in range(n):
        r, s = role[row], sequence[row]
        if r >= 0:
            for j in range(k):
                if not (low[r, j] <= cosine(product[row, j], norm[row]) <= high[r, j]) and not fired[s, j]:
                    since[s, j], fired[s, j] = row, True
    return since


@njit(cache=True, nogil=True)
def _rows(since, sequence):
    """Return the rows in which anything is steered."""
    earliest = np.empty(len(since), np.int64)
    for s in range(len(since)):
        earliest[s] = since[s].min()
    rows = np.empty(len(sequence), np.int64)
    count = 0
    for row in range(len(sequence)):
        if earliest[sequence[row]] <= row:
            rows[count] = row
            count += 1
    return rows[:count]


@njit(cache=True, nogil=True)
def _solve(target, mask, gram, out):
    """Solve `G x = target` within the mask of each row by conjugate residuals, up to what lies along nearly dependent directions.

    They are conjugate gradients whose steps never lengthen the residual, which G being nearly singular would allow those to do.
    """
    k = len(gram)
    chosen = np.empty(k, np.int64)
    x, rest, image, toward, toward_image = np.empty((5, k))
    for row in range(len(target)):
        count = 0
        for j in range(k):
            if mask[row, j]:
                chosen[count], rest[count] = j, target[row, j]
                count += 1
        x[:count], toward[:count], toward_image[:count] = 0, 0, 0
        enough, before = 1e-14 * _dot(rest, rest, count), np.inf
        for _ in range(2 * count):
            for i in range(count):
                image[i] = 0
                for j in range(count):
                    image[i] += gram[chosen[i], chosen[j]] * rest[j]
            bend, square = _dot(rest, image, count), _dot(rest, rest, count)
            if not square > enough or bend <= DEPENDENT * square:
                break
            for i in range(count):
                toward[i] = rest[i] + bend / before * toward[i]
                toward_image[i] = image[i] + bend / before * toward_image[i]
            before = bend
            step = _dot(rest, toward_image, count) / _dot(toward_image, toward_image, count)
            for i in range(count):
                x[i] += step * toward[i]
                rest[i] -= step * toward_image[i]
        for i in range(count):
            out[row, chosen[i]] = x[i]


@njit(cache=True, nogil=True)
def _dot(a, b, count):
    total = 0.0
    for i in range(count):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
def _clamp(along, norm, mask, low, high, gram, out):
    """Bring the cosines within the mask of each row into their ranges, in turn, until all are."""
    for row in range(len(along)):
        product, square = along[row].astype(np.float64), np.float64(norm[row]) ** 2
        for _ in range(ROUNDS):
            settled = True
            for j in range(len(product)):
                c = product[j] / np.sqrt(square) if square > 0 else 0.0
                bound = low[row, j] if c < low[row, j] else high[row, j] if c > high[row, j] else c
                if mask[row, j] and bound != c and abs(bound) < 1:
                    rest = max(0.0, square - product[j] ** 2)
                    change = bound * np.sqrt(rest / (1 - bound**2)) - product[j]
                    settled &= abs(change) <= SETTLED * np.sqrt(square)
                    square = rest + (product[j] + change) ** 2
                    out[row, j] += change
                    for i in range(len(product)):
                        product[i] += change * gram[i, j]
            if settled:
                break
