"""Rows are sorted by task and cut into tiles of one task each; a tile of delta is masked in registers on its way to the product."""

import torch
import triton
import triton.language as tl

from siftmasks.ops.triton import round_to

ROWS, COLUMNS, INNER = 16, 64, 64  # rows of x, rows of delta and their common width in one tile; tensor cores want 16 rows


def masked_delta_mm(x, delta, bits, task_of_row, signed):
    """See `siftmasks.ops.masked_delta_mm`."""
    (n, width), height, tasks = x.shape, len(delta), len(bits)
    out = x.new_empty(n, height)
    if not out.numel():
        return out
    # Which tile holds which task is computed on the device, so that nothing waits; the first "task" is -1, no mask.
    sizes = task_of_row.new_zeros(tasks + 1).index_add_(0, task_of_row + 1, torch.ones_like(task_of_row))
    stops, tile_stops = sizes.cumsum(0), ((sizes + ROWS - 1) // ROWS).cumsum(0)
    tiles = min(n, n // ROWS + tasks + 1)
    grid = (tiles, triton.cdiv(height, COLUMNS))
    widen = not x.is_cuda  # the interpreter multiplies bfloat16 as bit patterns
    with torch.cuda.device_of(out):
        _masked_delta_mm[grid](
            x, delta, bits, task_of_row.argsort(), sizes, stops, tile_stops, out, width, height, bits.stride(0),
            tasks, signed, widen, ROWS, COLUMNS, INNER, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _masked_delta_mm(
    x, delta, bits, order, sizes, stops, tile_stops, out, width, height, bytes_per_task: tl.int64,
    tasks, SIGNED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.full([], 0, tl.int32)  # the first whose tiles stop beyond this one, by bisection
    beyond = slot + tasks + 1
    while slot < beyond:
        middle = (slot + beyond) // 2
        if tl.load(tile_stops + middle) <= tile:
            slot = middle + 1
        else:
            beyond = middle
    if slot > tasks:
        return  # there are at most as many tiles as programs
    size, stop = tl.load(sizes + slot), tl.load(stops + slot)
    place = stop - size + (tile - (tl.load(tile_stops + slot) - (size + ROWS - 1) // ROWS)) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + place, place < stop, other=0)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, INNER):
        inner = first + tl.arange(0, INNER)
        left = tl.load(x + row[:, None] * width + inner[None, :], (place < stop)[:, None] & (inner < width)[None, :], other=0.0)
        inside = (inner < width)[:, None] & (column < height)[None, :]
        index = column[None, :] * width + inner[:, None]
        right = tl.load(delta + index, inside, other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        if slot > 0:
            byte = tl.load(bits + (slot - 1) * bytes_per_task + index // 8, inside, other=0)
            right = tl.where((byte >> (index % 8).to(tl.uint8) & 1) == 1, right, -right if SIGNED else 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place_out = out + row[:, None] * height + column[None, :]
    tl.store(place_out, round_to(total, out.dtype.element_ty), (place < stop)[:, None] & (column < height)[None, :])
