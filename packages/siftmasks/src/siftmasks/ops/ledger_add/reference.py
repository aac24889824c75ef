"""The ledger in plain torch, through int64: the oracle of the kernels."""

from torch import Tensor

from siftmasks.bits import pack_bits, unpack_bits
from siftmasks.grid import Grid


def quantize(task_vector: Tensor, grid: Grid, signed: bool) -> tuple[Tensor, Tensor, int, int]:
    """Return levels, packed bits and how many coordinates saturate and are not finite (their levels mean nothing)."""
    level = (task_vector.abs() / grid.step).round()  # half to even
    not_finite = (~task_vector.isfinite()).sum()
    saturated = (level > grid.largest).sum()
    levels = level.nan_to_num().clamp(max=grid.largest).to(grid.level_dtype)
    return levels, pack_bits(task_vector > 0 if signed else level > 0), int(saturated), int(not_finite)


def move(levels: Tensor, total: Tensor, count: Tensor, signs: Tensor | None, positive: Tensor | None, way: int) -> None:
    """Add (`way` 1) or subtract (-1) levels, in place."""
    level = levels.long()
    total.copy_(total.long() + way * level)
    count.copy_(count.long() + way * (level > 0))
    if signs is not None and positive is not None:
        positive.copy_(positive.long() + way * level * unpack_bits(signs, levels.numel()).view(levels.shape))


def underflows(levels: Tensor, total: Tensor, count: Tensor, signs: Tensor | None, positive: Tensor | None) -> int:
    """Return at how many coordinates the subtraction of these levels would underflow."""
    level = levels.long()
    short = (level > total.long()) | ((level > 0) & (count.long() == 0))
    if signs is not None and positive is not None:
        added = positive.long()
        up = unpack_bits(signs, levels.numel()).view(levels.shape)
        short |= level > added.where(up, total.long() - added)
    return int(short.sum())
