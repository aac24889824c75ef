"""The ledger in plain torch, through int64: the oracle of the kernels."""

from torch import Tensor

from siftmasks.bits import pack_bits, unpack_bits
from siftmasks.grid import Grid
from siftmasks.ops.reference import signs as sign_vector


def quantize(
    weight: Tensor, base: Tensor | None, key: tuple[int, int] | None, grid: Grid, signed: bool
) -> tuple[Tensor, Tensor, list[float]]:
    """Return levels, packed bits, and four sums: how many coordinates saturate and are not finite (their levels mean nothing), and squares.

    The squares are those of the difference before and after what lies against the signs of the key is set to 0.
    """
    task_vector = weight.float() if base is None else weight.float() - base.float()
    kept = task_vector
    if key is not None:
        kept = task_vector.where(task_vector * sign_vector(key, weight.shape, weight.device) > 0, 0)
    level = (kept.abs() / grid.step).round()  # half to even
    levels = level.nan_to_num().clamp(max=grid.largest).to(grid.level_dtype)
    squares = [tensor.double().square().sum() for tensor in (task_vector, kept)]
    seen = [(level > grid.largest).sum(), (~task_vector.isfinite()).sum(), *squares]
    return levels, pack_bits(kept > 0 if signed else level > 0), [float(number) for number in seen]


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
