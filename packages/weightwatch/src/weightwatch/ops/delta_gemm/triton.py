"""The product as one kernel: two tiles of weights become a tile of their difference in registers, on its way to the product."""

import torch
import triton
import triton.language as tl

ROWS, INNER = 32, 32  # of a tile: along either side a load takes 64 bytes or more
PROGRAMS = 2**10  # the inner side is split until about so many run: 8 for each multiprocessor of a large GPU


def delta_gemm(base, post, right):
    """See `weightwatch.ops.delta_gemm`; the weights have any strides."""
    (rows, inner), q = post.shape, right.shape[1]
    columns = min(64, max(16, triton.next_power_of_2(q)))
    tiles = triton.cdiv(rows, ROWS), triton.cdiv(q, columns)
    if not rows or not q:
        return right.new_zeros(rows, q)
    steps = triton.cdiv(inner, INNER)
    each = triton.cdiv(steps, max(1, min(steps, PROGRAMS // (tiles[0] * tiles[1]))))
    parts = right.new_empty(max(1, triton.cdiv(steps, max(1, each))), rows, q)
    with torch.cuda.device_of(post):
        _delta_gemm[*tiles, len(parts)](
            base, post, right, parts, rows, inner, q, *base.stride(), *post.stride(), each * INNER, ROWS, columns, INNER,
            enable_fp_fusion=True,
        )  # fmt: skip
    return parts.sum(0)  # in this order always, where atomic additions would come in any


@triton.jit
def _delta_gemm(
    base, post, right, parts, rows, inner, q, base_row, base_inner, post_row, post_inner, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(2) * part
    for start in range(first, min(first + part, inner), INNER):
        place = start + tl.arange(0, INNER).to(tl.int64)
        inside = (row < rows)[:, None] & (place < inner)[None, :]
        after = tl.load(post + row[:, None] * post_row + place[None, :] * post_inner, inside, other=0.0).to(tl.float32)
        before = tl.load(base + row[:, None] * base_row + place[None, :] * base_inner, inside, other=0.0).to(tl.float32)
        r = tl.load(right + place[:, None] * q + column[None, :], (place < inner)[:, None] & (column < q)[None, :], other=0.0)
        # float32 operands keep all their bits: tf32, the default, would be wrong in the third digit of a small difference.
        total = tl.dot(after - before, r, total, input_precision="ieee")
    out = parts + (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * q + column[None, :]
    tl.store(out, total, (row < rows)[:, None] & (column < q)[None, :])
