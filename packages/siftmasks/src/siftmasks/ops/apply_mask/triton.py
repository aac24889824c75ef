"""The served weights as one kernel: bit-equal to the reference (correctly rounded quotients, no contraction)."""

import torch
import triton
import triton.language as tl

from siftmasks.ops.triton import ROWS, draw_bits, load_bits, round_to, tile, widen


def apply_mask(base, total, bits, count, positive, key, factor, out):
    """See `siftmasks.ops.apply_mask`; `factor` is the step times the scale."""
    size, words = out.numel(), 0 if key is None else key[0] | key[1] << 32
    if size:
        with torch.cuda.device_of(out):
            _apply_mask[(triton.cdiv(size, ROWS.value * 32),)](
                base, total, bits, count, positive, words, factor, out, size, key is not None, enable_fp_fusion=False
            )


@triton.jit(do_not_specialize=["key", "factor"])
def _apply_mask(base, total, bits, count, positive, key: tl.uint64, factor, out, size, WITH_KEY: tl.constexpr):
    first, offset = tile()
    inside = offset < size
    n = tl.load(total + offset, inside, other=0)
    if positive is not None:
        n = 2 * tl.load(positive + offset, inside, other=0).to(tl.int64) - n.to(tl.int64)
    magnitude = n.to(tl.float32) * factor
    if count is not None:
        c = tl.load(count + offset, inside, other=0).to(tl.float32)
        magnitude = tl.where(c > 0, tl.div_rn(magnitude, tl.where(c > 0, c, 1.0)), 0.0)
    sign = tl.full(offset.shape, 1, tl.int32)
    if WITH_KEY:
        sign = 2 * draw_bits(key, first) - 1
        if bits is not None:
            sign *= load_bits(bits, first, size)
    elif bits is not None:
        sign = 2 * load_bits(bits, first, size) - 1
    served = widen(tl.load(base + offset, inside, other=0)) + sign.to(tl.float32) * magnitude
    tl.store(out + offset, round_to(served, out.dtype.element_ty), inside)
