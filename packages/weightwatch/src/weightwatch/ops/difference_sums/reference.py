"""The sums as they are defined, one tensor for each."""

import torch
from torch import Tensor


def difference_sums(
    base: Tensor | None, post: Tensor, gains: tuple[Tensor | None, Tensor | None], rounding: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """See `weightwatch.ops.difference_sums`."""
    after = _scaled(post, gains[1])
    before = torch.zeros_like(after) if base is None else _scaled(base, gains[0])
    delta = after - before
    smallest, share = rounding
    power = (post.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2|w|)
    deviation = _scaled(power.clamp(min=smallest) * share, gains[1])
    squares = [one.double().square() for one in (before, after, delta, deviation)]
    rows, columns = torch.stack([one.sum(1) for one in squares]), torch.stack([one.sum(0) for one in squares[2:]])
    return delta.float(), rows, columns, int(delta.count_nonzero())


def _scaled(weights: Tensor, gain: Tensor | None) -> Tensor:
    wide = weights if weights.dtype == torch.float64 else weights.float()
    return wide if gain is None else wide * gain[:, None]
