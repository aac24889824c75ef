"""The extremes of cosines as one kernel: a tile of rows meets all directions, chunk by chunk, and leaves only its extremes."""

import torch
import triton
import triton.language as tl

INNER = 32  # numbers of a row at a time: with more, a tile of float32 does not fit the registers
EMPTY = 0x7F800000_FFFFFFFF  # the order of +inf, and row -1
LAST = tl.constexpr(0x7FFFFFFF_FFFFFFFF)  # comes after every order and row


def cos_minmax(hidden, directions, group, groups):
    """See `weightwatch.ops.cos_minmax`; all tensors have layers."""
    (layers, n, d), k = hidden.shape, directions.shape[1]
    best = torch.full((layers, groups, 2, k), EMPTY, dtype=torch.int64, device=hidden.device)
    if n and best.numel():
        rows, columns = 16 if n <= 16 else 64, min(64, max(16, triton.next_power_of_2(k)))
        # The interpreter multiplies bfloat16 as bit patterns; a product of two dtypes is one of float32.
        widen = triton.knobs.runtime.interpret or hidden.dtype != directions.dtype
        with torch.cuda.device_of(hidden):
            _cos_minmax[triton.cdiv(n, rows), layers, triton.cdiv(k, columns)](
                hidden, directions, group, best, n, d, k, groups, widen, rows, columns, INNER,
                num_warps=4 if rows == 16 else 8, enable_fp_fusion=True,
            )  # fmt: skip
    row, order = best.view(torch.int32).view(*best.shape, 2).unbind(-1)
    low, high = _from_order(order).unbind(2)
    return low, -high, *row.long().unbind(2)


def _from_order(order):
    return (order ^ (order >> 31 & 0x7FFFFFFF)).view(torch.float32)


@triton.jit
def _cos_minmax(
    hidden, directions, group, best, n, d, k, groups,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    cosine = cosines(hidden + layer * n * d, directions + layer * k * d, row, column, n, d, k, WIDEN, INNER)[0]
    low, high = _packed(cosine, row), _packed(-cosine, row)
    # Most tiles lie within one group, so the groups are taken one after the other: an atomic operation per direction and group.
    best += layer * groups * 2 * k + column
    left = tl.load(group + row, row < n, other=-1)
    left = tl.where(left < groups, left, -1)
    current = tl.max(left, 0)
    while current >= 0:
        mine = (left == current)[:, None]
        place = best + current * 2 * k
        tl.atomic_min(place, tl.min(tl.where(mine, low, LAST), 0), column < k, sem="relaxed")
        tl.atomic_min(place + k, tl.min(tl.where(mine, high, LAST), 0), column < k, sem="relaxed")
        left = tl.where(left == current, -1, left)
        current = tl.max(left, 0)


@triton.jit
def cosines(hidden, directions, row, column, n, d, k, WIDEN: tl.constexpr, INNER: tl.constexpr):
    """Return `u·h / |h|` (0 for a row of zeros, NaN for one whose sum of squares is not finite), `u·h` and `|h|²` of a tile."""
    square = tl.zeros((row.shape[0],), tl.float32)
    product = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, d, INNER):
        inner = start + tl.arange(0, INNER)
        h = tl.load(hidden + row[:, None] * d + inner[None, :], (row < n)[:, None] & (inner < d)[None, :], other=0.0)
        u = tl.load(directions + column[None, :] * d + inner[:, None], (column < k)[None, :] & (inner < d)[:, None], other=0.0)
        wide = h.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        # float32 operands keep all their bits: tf32, the default, would be wrong in the third digit of a cosine.
        product = tl.dot(wide if WIDEN else h, u.to(tl.float32) if WIDEN else u, product, input_precision="ieee")
    factor = tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)
    factor = tl.where(square < float("inf"), factor, float("nan"))
    return product * factor[:, None], product, square


@triton.jit
def _packed(value, row):
    """Return int64 whose order is that of the values, NaN before all of them, and of the rows among equals."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 equals 0
    order = tl.where(value == value, bits ^ (bits >> 31 & 0x7FFFFFFF), -0x80000000)
    return (order.to(tl.int64) << 32) | row[:, None]
