"""The ledger as kernels of one pass each; what they count is a sum of integers, the same in any order."""

import torch
import triton
import triton.language as tl

from siftmasks.ops.triton import ROWS, load_bits, store_bits, tile


def quantize(task_vector, grid, signed):
    """Return levels, packed bits and how many coordinates saturate and are not finite (their levels mean nothing)."""
    size = task_vector.numel()
    levels = torch.empty_like(task_vector, dtype=grid.level_dtype)
    packed = torch.empty((size + 7) // 8, dtype=torch.uint8, device=task_vector.device)
    seen = torch.zeros(2, dtype=torch.int64, device=task_vector.device)
    if size:
        with torch.cuda.device_of(levels):
            _quantize[_grid(size)](
                task_vector, levels, packed, seen, 1 / grid.step, float(grid.largest), size, signed,
                enable_fp_fusion=False,
            )  # fmt: skip
    saturated, not_finite = seen.tolist()
    return levels, packed, saturated, not_finite


def move(levels, total, count, signs, positive, way):
    """Add (`way` 1) or subtract (-1) levels, in place."""
    if levels.numel():
        signs = signs if signs is None else signs.contiguous()
        with torch.cuda.device_of(levels):
            _move[_grid(levels.numel())](levels, total, count, signs, positive, levels.numel(), way, enable_fp_fusion=False)


def underflows(levels, total, count, signs, positive):
    """Return at how many coordinates the subtraction of these levels would underflow."""
    found = torch.zeros(1, dtype=torch.int64, device=levels.device)
    if levels.numel():
        signs = signs if signs is None else signs.contiguous()
        with torch.cuda.device_of(levels):
            _underflows[_grid(levels.numel())](
                levels, total, count, signs, positive, found, levels.numel(), enable_fp_fusion=False
            )
    return int(found)


def _grid(size):
    return (triton.cdiv(size, ROWS.value * 32),)


@triton.jit(do_not_specialize=["inverse", "largest"])
def _quantize(task_vector, levels, packed, seen, inverse, largest, size, SIGNED: tl.constexpr):
    first, offset = tile()
    inside = offset < size
    tau = tl.load(task_vector + offset, inside, other=0)
    exact = tl.abs(tau) * inverse
    tl.atomic_add(seen, tl.sum((exact >= largest + 0.5).to(tl.int64)))
    tl.atomic_add(seen + 1, tl.sum((tl.abs(tau) < float("inf")).to(tl.int32) ^ 1).to(tl.int64))
    # added to a float32 below 2**22, 2**23 rounds it to an integer, half to even, which the low bits then hold
    level = (tl.minimum(exact, largest) + 8388608.0).to(tl.uint32, bitcast=True) & 0xFFFF
    tl.store(levels + offset, level.to(levels.dtype.element_ty), inside)
    store_bits((tau > 0 if SIGNED else level > 0).to(tl.int32), packed, first, size)


@triton.jit(do_not_specialize=["way"])
def _move(levels, total, count, signs, positive, size, way):
    first, offset = tile()
    inside = offset < size
    level = tl.load(levels + offset, inside, other=0).to(tl.int64)
    _change(total + offset, way * level, inside)
    _change(count + offset, way * (level > 0).to(tl.int64), inside)
    if positive is not None:
        _change(positive + offset, way * level * load_bits(signs, first, size), inside)


@triton.jit
def _change(place, amount, inside):
    changed = tl.load(place, inside, other=0).to(tl.int64) + amount
    tl.store(place, changed.to(place.dtype.element_ty), inside)


@triton.jit
def _underflows(levels, total, count, signs, positive, found, size):
    first, offset = tile()
    inside = offset < size
    level = tl.load(levels + offset, inside, other=0).to(tl.int64)
    n = tl.load(total + offset, inside, other=0).to(tl.int64)
    short = (level > n) | ((level > 0) & (tl.load(count + offset, inside, other=0) == 0))
    if positive is not None:
        p = tl.load(positive + offset, inside, other=0).to(tl.int64)
        short |= level > tl.where(load_bits(signs, first, size) == 1, p, n - p)
    tl.atomic_add(found, tl.sum(short.to(tl.int64)))
