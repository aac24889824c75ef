"""The ledger as kernels of one pass each; what they count is a sum of integers, the same in any order."""

import torch
import triton
import triton.language as tl

from siftmasks.ops.triton import ROWS, draw_bits, load_bits, store_bits, tile, widen


def quantize(weight, base, key, grid, signed):
    """See `reference.quantize`. Each program sums for itself: so the sums of squares do not depend on which comes first."""
    size, words = weight.numel(), 0 if key is None else key[0] | key[1] << 32
    levels = torch.empty_like(weight, dtype=grid.level_dtype)
    packed = torch.empty((size + 7) // 8, dtype=torch.uint8, device=weight.device)
    programs = _grid(size)
    seen = torch.zeros(4, *programs, dtype=torch.float64, device=weight.device)
    if size:
        with torch.cuda.device_of(levels):
            _quantize[programs](
                weight, base, words, levels, packed, seen, 1 / grid.step, float(grid.largest), size, key is not None, signed,
                enable_fp_fusion=False,
            )  # fmt: skip
    return levels, packed, seen.sum(1).tolist()


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


@triton.jit(do_not_specialize=["key", "inverse", "largest"])
def _quantize(
    weight, base, key: tl.uint64, levels, packed, seen, inverse, largest, size, WITH_KEY: tl.constexpr, SIGNED: tl.constexpr
):
    first, offset = tile()
    inside = offset < size
    tau = widen(tl.load(weight + offset, inside, other=0))
    if base is not None:
        tau -= widen(tl.load(base + offset, inside, other=0))
    kept = tau
    if WITH_KEY:
        kept = tl.where(tau * (2 * draw_bits(key, first) - 1) > 0, tau, 0.0)
    exact = tl.abs(kept) * inverse
    # added to a float32 below 2**22, 2**23 rounds it to an integer, half to even, which the low bits then hold
    level = (tl.minimum(exact, largest) + 8388608.0).to(tl.uint32, bitcast=True) & 0xFFFF
    tl.store(levels + offset, level.to(levels.dtype.element_ty), inside)
    store_bits((kept > 0 if SIGNED else level > 0).to(tl.int32), packed, first, size)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(seen + program, tl.sum((exact >= largest + 0.5).to(tl.float64)))
    tl.store(seen + programs + program, tl.sum(((tl.abs(tau) < float("inf")).to(tl.int32) ^ 1).to(tl.float64)))
    tl.store(seen + 2 * programs + program, tl.sum(tau.to(tl.float64) * tau.to(tl.float64)))
    tl.store(seen + 3 * programs + program, tl.sum(kept.to(tl.float64) * kept.to(tl.float64)))


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
