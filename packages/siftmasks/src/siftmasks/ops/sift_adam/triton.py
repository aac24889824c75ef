"""The step of sign-fixed tuning as one kernel: bit-equal to the reference (correctly rounded roots and quotients, no contraction)."""

import torch
import triton
import triton.language as tl

from siftmasks.ops.triton import ROWS, draw_bits, round_to, tile, widen


def sift_adam(weight, base, task_vector, exp_avg, exp_avg_sq, grad, key, constants):
    """See `siftmasks.ops.sift_adam`; `weight`, `task_vector` and the moments change in place."""
    size, words = weight.numel(), 0 if key is None else key[0] | key[1] << 32
    grid = (triton.cdiv(size, ROWS.value * 32),)
    if size:
        with torch.cuda.device_of(weight):
            _sift_adam[grid](
                weight, base, task_vector, exp_avg, exp_avg_sq, grad, words, *constants, size, key is not None,
                enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["key", "beta1", "rest1", "beta2", "rest2", "step_size", "rescale", "eps"])
def _sift_adam(
    weight, base, task_vector, exp_avg, exp_avg_sq, grad, key: tl.uint64,
    beta1, rest1, beta2, rest2, step_size, rescale, eps, size, PROJECT: tl.constexpr,
):  # fmt: skip
    first, offset = tile()
    inside = offset < size
    g = widen(tl.load(grad + offset, inside, other=0))
    m = beta1 * tl.load(exp_avg + offset, inside, other=0) + rest1 * g
    s = beta2 * tl.load(exp_avg_sq + offset, inside, other=0) + rest2 * g * g
    tau = tl.load(task_vector + offset, inside, other=0)
    tau -= tl.div_rn(step_size * m, tl.sqrt_rn(s) * rescale + eps)
    if PROJECT:
        v = 2 * draw_bits(key, first) - 1
        tau = tl.where(tau * v <= 0, 0.0, tau)
    tl.store(exp_avg + offset, m, inside)
    tl.store(exp_avg_sq + offset, s, inside)
    tl.store(task_vector + offset, tau, inside)
    refreshed = widen(tl.load(base + offset, inside, other=0)) + tau
    tl.store(weight + offset, round_to(refreshed, weight.dtype.element_ty), inside)
