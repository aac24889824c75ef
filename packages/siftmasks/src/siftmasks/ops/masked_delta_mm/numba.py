"""Tasks of few rows in one pass over delta: a row of it is masked in the first-level cache for each task and multiplied there."""

import numpy as np
import torch
from numba import njit, prange

from siftmasks.ops.masked_delta_mm import reference
from siftmasks.ops.numba import factors, load_floats, load_words, raw

FEW = 128  # rows of one task up to which this beats unpacking its whole mask and a matrix product
CHUNK = 16  # rows of delta that a thread takes at a time


def masked_delta_mm(x, delta, bits, task_of_row, signed):
    """See `siftmasks.ops.masked_delta_mm`."""
    tasks, of_row, sizes = task_of_row.unique(return_inverse=True, return_counts=True)
    few = sizes[of_row] <= FEW
    if not few.all():
        out = x.new_empty(len(x), len(delta))
        out[~few] = reference.masked_delta_mm(x[~few], delta, bits, task_of_row[~few], signed)
        out[few] = masked_delta_mm(x[few], delta, bits, task_of_row[few], signed)
        return out
    order, stops = of_row.argsort(), sizes.cumsum(0)
    product = torch.empty(len(x), len(delta))
    arguments = x[order].float().numpy(), raw(delta), bits.numpy(), tasks.numpy(), stops.numpy(), signed, product.numpy()
    _all(*arguments) if len(delta) > CHUNK else _chunk(*arguments, 0)
    return product[order.argsort()].to(x.dtype)


@njit(parallel=True, cache=True, nogil=True)
def _all(x, delta, bits, tasks, stops, signed, out):
    for chunk in prange((out.shape[1] + CHUNK - 1) // CHUNK):
        _chunk(x, delta, bits, tasks, stops, signed, out, chunk * CHUNK)


# Sums in any order: they are vectorised, and differ by their rounding from those of other machines, not between numbers of threads.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _chunk(x, delta, bits, tasks, stops, signed, out, start):
    width = x.shape[1]
    words = (width + 7 + 31) // 32  # a row of delta begins within a byte
    mask, ones = np.empty(words, np.uint32), np.full(words, 0xFFFFFFFF, np.uint32)
    factor, buffer, masked = np.empty(32 * words, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(start, min(start + CHUNK, out.shape[1])):
        whole = load_floats(delta, row * width, buffer)
        skip = row * width % 8
        first = 0
        for group in range(len(tasks)):
            if tasks[group] >= 0:
                load_words(bits[tasks[group]], row * width - skip, mask)
                factors(ones if signed else mask, mask if signed else ones, factor)
                for i in range(width):
                    masked[i] = whole[i] * factor[skip + i]
            else:
                masked[:] = whole
            for r in range(first, stops[group]):
                total = np.float32(0)
                for i in range(width):
                    total += x[r, i] * masked[i]
                out[r, row] = total
            first = stops[group]
