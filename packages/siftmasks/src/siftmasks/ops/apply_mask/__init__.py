"""The weights that are served: base, ledger, signs and mask in one pass over memory."""

import torch
from torch import Tensor

from lmcore.dispatch import pick
from siftmasks.ops.arguments import FLOATS, UNSIGNED, expect, expect_in_place


def apply_mask(
    base: Tensor,
    total: Tensor,
    bits: Tensor | None,
    *,
    step: float,
    scale: float | None = None,
    key: tuple[int, int] | None = None,
    count: Tensor | None = None,
    positive: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weights of one task, or of the model without a mask: `base + delta`, rounded once; in `out`, if that is given.

        magnitude = N (step scale)    or, with a count,   (N step) / C where C > 0, else 0
        delta = v m magnitude         mode "sift": a key gives v, the bits are the mask m; no bits: m = 1
        delta = (2 b - 1) magnitude   mode "signs": no key, the bits b are the task's own signs
        delta = magnitude             mode "signs" without bits, N being 2 `positive` - `total`: the maskless model

    N is `total`, C is `count`. `scale` is 1 / T for the mean over T tasks (the paper), or any other number; a count takes its place and
    makes the mean one over the tasks that use a coordinate. In mode "signs" the bits are no mask: a coordinate the task did not move is
    served the others' N, as +N or -N by its bit. Arithmetic is float32: N, `step scale` and every operation are rounded once, from left to
    right, to the same bits by every back end. v is made of `key = lmcore.random.key(seed, name)` as in `siftmasks.signs`.

    Moves a base weight, a total, a bit and the result, and the count where there is one: 6 to 14 bytes per weight, the limit being memory
    bandwidth; fuses what takes unpacking, two or three products, a sum and a cast, each with a tensor in between. Touching the memory of a
    large new tensor for the first time can take several times as long as the op itself: a live model is better served with `out`.

    >>> base, total, mask = torch.ones(4), torch.tensor([8, 0, 4, 8], dtype=torch.uint16), torch.tensor([0b0101], dtype=torch.uint8)
    >>> apply_mask(base, total, mask, step=2**-4, scale=0.5, key=(0, 0))
    tensor([1.2500, 1.0000, 1.1250, 1.0000])
    >>> apply_mask(base, total, None, step=2**-4, scale=0.5, key=(0, 0))  # without a mask
    tensor([1.2500, 1.0000, 1.1250, 0.7500])

    Shapes: all equal, any rank, and the result; `bits` [ceil(size / 8)] as in `siftmasks.bits`.
    Dtypes: `base` and the result (`dtype`, that of `out`, or else that of `base`) float32, bfloat16 or float16; `total` and `positive`
    share uint8, uint16 or uint32, `count` has its own; `bits` uint8.
    Raises: `ValueError` naming the tensor whose shape, dtype or device does not fit, or an `out` that is not contiguous; also unless one of
    `scale` and `count` is given and not both, if neither bits, key nor `positive` say what the signs are, if `positive` comes with bits or
    a key, or `dtype` with `out`.
    Source: SIFT-Masks, Kuo et al. 2025, §3.
    """
    expect("base", base, base, *FLOATS)
    expect("total", total, base, *UNSIGNED)
    if count is not None:
        expect("count", count, base, *UNSIGNED)
    if positive is not None:
        expect("positive", positive, base, total.dtype)
    if bits is not None:
        expect("bits", bits, base, torch.uint8, shape=((base.numel() + 7) // 8,))
    if out is not None:
        expect_in_place("out", out, base, *FLOATS)
        if dtype is not None:
            raise ValueError(f"dtype is {dtype}, but out is given: it has its own")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype is {dtype}: expected {' or '.join(map(str, FLOATS))}")
    if (scale is None) == (count is None):
        raise ValueError(f"scale is {scale} and count is {'given' if count is not None else None}: expected one of the two")
    if bits is None and (key is None) == (positive is None):
        raise ValueError('without bits, either a key (mode "sift") or positive (mode "signs") gives the signs')
    if bits is not None and positive is not None:
        raise ValueError("positive is for the model without a mask: it does not go with bits")
    factor = step if scale is None else step * scale
    served = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device) if out is None else out
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in (base, total, bits, count, positive)]
    with torch.no_grad():
        pick(__name__, base).apply_mask(*tensors, key, factor, served)
    return served
