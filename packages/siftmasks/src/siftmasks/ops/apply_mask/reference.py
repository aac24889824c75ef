"""The served weights as formulas: the oracle of the kernels, bit for bit."""

import torch
from torch import Tensor

from siftmasks.bits import unpack_bits
from siftmasks.ops.reference import signs


def apply_mask(
    base: Tensor, total: Tensor, bits: Tensor | None, count: Tensor | None, positive: Tensor | None,
    key: tuple[int, int] | None, factor: float, out: Tensor,
) -> None:  # fmt: skip
    """Write `base + sign * magnitude` to `out`; every operation rounds once to float32."""
    levels = total.long() if positive is None else 2 * positive.long() - total.long()
    magnitude = levels.float() * factor
    if count is not None:
        magnitude = (magnitude / count.float()).where(count.long() > 0, 0)
    sign = torch.ones_like(base, dtype=torch.int8) if key is None else signs(key, base.shape, base.device)
    if bits is not None:
        bit = unpack_bits(bits, base.numel()).view(base.shape)
        sign = 2 * bit.to(torch.int8) - 1 if key is None else sign * bit
    out.copy_(base.float() + sign * magnitude)
