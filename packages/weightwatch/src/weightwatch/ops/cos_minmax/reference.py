"""The extremes of cosines as formulas: the oracle of the kernels."""

import torch
from torch import Tensor


def cos_minmax(hidden: Tensor, directions: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return low, high and their rows, each [layers, groups, k]."""
    cosine = cosines(hidden, directions)
    shape = len(hidden), groups, directions.shape[1]
    low, high = (cosine.new_full(shape, end) for end in (torch.inf, -torch.inf))
    low_at, high_at = (group.new_full(shape, -1) for _ in range(2))
    for number in group.unique().tolist():
        if 0 <= number < groups:
            rows = (group == number).nonzero().flatten()
            c = cosine[:, rows]
            for best, extreme, at in ((c.amin(1), low, low_at), (c.amax(1), high, high_at)):
                first = ((c == best[:, None]) | c.isnan()).int().argmax(1)  # of equals, argmax returns the first
                extreme[:, number], at[:, number] = best, rows[first]
    return low, high, low_at, high_at


def cosines(hidden: Tensor, directions: Tensor) -> Tensor:
    """Return `u·h / |h|` [..., n, k] in float32: 0 for a row of zeros, NaN for one whose sum of squares is not finite."""
    wide = hidden.float()
    square = wide.square().sum(-1, keepdim=True)
    cosine = (wide @ directions.float().mT) / square.sqrt()
    return cosine.where(square > 0, 0.0).where(square.isfinite(), torch.nan)
