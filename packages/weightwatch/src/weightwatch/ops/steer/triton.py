"""Steering as two kernels: the first finds from which row on each direction of a sequence is steered, the second steers.

Between them lie only those rows, the products and the norms: nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from lmcore.rounding import round_to_bf16
from weightwatch.ops.cos_minmax.triton import cosines
from weightwatch.ops.steer.reference import DEPENDENT, ROUNDS, SETTLED

MOST = 128  # directions, all of which lie in one tile
TILE, INNER = 16, 64  # rows of a tile, as many as tensor cores want, and numbers of a row at a time


def steer(hidden, directions, low, high, role, sequence, fired, mode, scale, write, gram):
    """See `weightwatch.ops.steer`; with mode clamp, the last row of the bounds is that of role -1."""
    (n, d), k = hidden.shape, len(directions)
    if k > MOST:
        raise ValueError(f"directions is {tuple(directions.shape)}: at most {MOST} can be steered at once on a GPU")
    if gram is None:
        gram = directions.float() @ directions.float().T
    since = torch.where(fired, -1, n).to(torch.int32)
    product, norm, out = gram.new_empty(n, k), gram.new_empty(n), torch.empty_like(hidden)
    roles, sequences = len(low) - (mode == "clamp"), len(fired)
    columns = max(16, triton.next_power_of_2(k))
    # The interpreter multiplies bfloat16 as bit patterns; a product of two dtypes is one of float32.
    widen = triton.knobs.runtime.interpret or hidden.dtype != directions.dtype
    grid, sizes, options = (triton.cdiv(n, TILE),), (n, d, k, roles, sequences), {"num_warps": 8, "enable_fp_fusion": True}
    with torch.cuda.device_of(hidden):
        _fire[grid](
            hidden, directions, low, high, role, sequence, since, product, norm, *sizes, widen, TILE, columns, INNER, **options
        )
        _steer[grid](
            hidden, directions, low, high, role, sequence, since, product, norm, write,
            gram, out, 1.0 if scale is None else 1.0 - scale, *sizes, mode, ROUNDS, SETTLED, DEPENDENT, TILE, columns, INNER,
            **options,
        )  # fmt: skip
    torch.lt(since, n, out=fired)
    return out


@triton.jit
def _fire(
    hidden, directions, low, high, role, sequence, since, product, norm, n, d, k, roles, sequences,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    c, p, square = cosines(hidden, directions, row, column, n, d, k, WIDEN, INNER)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(product + row[:, None] * k + column[None, :], p, inside)
    tl.store(norm + row, tl.where(square < float("inf"), tl.sqrt(square), float("nan")), row < n)
    r, s = tl.load(role + row, row < n, other=-1), tl.load(sequence + row, row < n, other=-1)
    watched = inside & ((r >= 0) & (r < roles) & (s >= 0) & (s < sequences))[:, None]
    bound = r[:, None] * k + column[None, :]
    least, greatest = tl.load(low + bound, watched, other=0.0), tl.load(high + bound, watched, other=0.0)
    place = since + s[:, None] * k + column[None, :]
    later = tl.load(place, watched, other=-1) > row[:, None]  # few rows are, so that few have to take turns
    out_of_range = ((c >= least) & (c <= greatest)) == 0  # NaN is in no range
    tl.atomic_min(place, row[:, None].to(tl.int32), watched & later & out_of_range, sem="relaxed")


@triton.jit(do_not_specialize=["less"])
def _steer(
    hidden, directions, low, high, role, sequence, since, product, norm, write, gram, out, less, n, d, k, roles, sequences,
    MODE: tl.constexpr, ROUNDS: tl.constexpr, SETTLED: tl.constexpr, DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    r, s = tl.load(role + row, row < n, other=-1), tl.load(sequence + row, row < n, other=-1)
    inside = ((r < roles) & (s >= 0) & (s < sequences))[:, None] & (column < k)[None, :]
    mask = inside & (tl.load(since + s[:, None] * k + column[None, :], inside, other=n) <= row[:, None])
    steered = tl.max(mask.to(tl.int32), 1)
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    if tl.max(steered, 0) > 0:
        length = tl.load(norm + row, row < n, other=0.0)
        finite = length == length
        along = tl.load(product + row[:, None] * k + column[None, :], mask, other=0.0)
        mask = mask & finite[:, None]
        if MODE == "clamp":
            bound = tl.where(r < 0, roles, r)[:, None] * k + column[None, :]
            least, greatest = tl.load(low + bound, mask, other=-1.0), tl.load(high + bound, mask, other=1.0)
            change = _clamp(tl.where(mask, along, 0.0), length, mask, least, greatest, gram, column, k, ROUNDS, SETTLED)
        else:
            target = along * less
            if MODE == "revert":
                target = tl.load(write + row[:, None] * k + column[None, :], mask, other=0.0)
            change = _solve(tl.where(mask, -target, 0.0), mask, gram, column, k, DEPENDENT)
        change = tl.where(finite[:, None], change, float("nan"))
    for start in range(0, d, INNER):
        inner = start + tl.arange(0, INNER)
        place = row[:, None] * d + inner[None, :]
        wanted = (row < n)[:, None] & (inner < d)[None, :]
        h = tl.load(hidden + place, wanted, other=0.0)
        if tl.max(steered, 0) > 0:
            known = (column < k)[:, None] & (inner < d)[None, :]
            u = tl.load(directions + column[:, None] * d + inner[None, :], known, other=0.0)
            moved = tl.dot(change, u.to(tl.float32), h.to(tl.float32), input_precision="ieee")
            moved = round_to_bf16(moved) if out.dtype.element_ty == tl.bfloat16 else moved.to(out.dtype.element_ty)
            h = tl.where((steered > 0)[:, None], moved, h)
        tl.store(out + place, h, wanted)


@triton.jit
def _solve(target, mask, gram, column, k, DEPENDENT: tl.constexpr):
    """Solve `G x = target` within the mask of each row by conjugate residuals, up to what lies along nearly dependent directions.

    They are conjugate gradients whose steps never lengthen the residual, which G being nearly singular would allow those to do.
    """
    inside = (column < k)[:, None] & (column < k)[None, :]
    g = tl.load(gram + column[:, None] * k + column[None, :], inside, other=0.0)
    x, rest = tl.zeros_like(target), target
    toward, toward_image = x, x
    square = tl.sum(rest * rest, 1)
    enough = 1e-13 * square
    before = tl.full(square.shape, float("inf"), tl.float32)
    live = square > enough
    step = 0
    while (step < 2 * k) & (tl.max(live.to(tl.int32), 0) > 0):
        image = tl.where(mask, tl.dot(rest, g, input_precision="ieee"), 0.0)
        bend = tl.sum(rest * image, 1)
        live = live & (bend > DEPENDENT * square)
        again = tl.where(live, bend / before, 0.0)[:, None]
        toward, toward_image = rest + again * toward, image + again * toward_image
        before = tl.where(live, bend, 1.0)
        size = tl.sum(toward_image * toward_image, 1)
        length = tl.where(live, tl.sum(rest * toward_image, 1) / tl.where(live, size, 1.0), 0.0)[:, None]
        x += length * toward
        rest -= length * toward_image
        square = tl.sum(rest * rest, 1)
        live = live & (square > enough)
        step += 1
    return x


@triton.jit
def _clamp(product, norm, mask, low, high, gram, column, k, ROUNDS: tl.constexpr, SETTLED: tl.constexpr):
    """Bring the cosines within the mask of each row into their ranges, in turn, until all are."""
    x = tl.zeros_like(product)
    square = norm * norm
    moving = 1
    step = 0
    while (step < ROUNDS) & (moving > 0):
        moving = 0
        for j in range(k):
            this = (column == j)[None, :]
            along, least = tl.sum(tl.where(this, product, 0.0), 1), tl.sum(tl.where(this, low, 0.0), 1)
            greatest, chosen = tl.sum(tl.where(this, high, 0.0), 1), tl.max((this & mask).to(tl.int32), 1) > 0
            c = tl.where(square > 0, along / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
            bound = tl.where(c < least, least, greatest)
            chosen = chosen & ((c < least) | (c > greatest)) & (tl.abs(bound) < 1)
            bound = tl.where(chosen, bound, 0.0)
            rest = tl.maximum(square - along * along, 0.0)
            change = tl.where(chosen, bound * tl.sqrt(rest / (1 - bound * bound)) - along, 0.0)
            moving = tl.maximum(moving, tl.max((tl.abs(change) > SETTLED * tl.sqrt(square)).to(tl.int32), 0))
            square = tl.where(chosen, rest + (along + change) * (along + change), square)
            x += tl.where(this, change[:, None], 0.0)
            g = tl.load(gram + j * k + column, column < k, other=0.0)
            product += change[:, None] * g[None, :]
        step += 1
    return x
