"""The search as tensors: all points of a grid at once."""

import torch
from torch import Tensor

POINTS = 24
"""Parts that a grid cuts its range into."""
ROUNDS = 3
"""Grids, each over four parts of the one before, so that p and q are right to a thousandth of their range."""


def product_edge(rows: Tensor, columns: Tensor) -> tuple[float, float]:
    """See `weightwatch.ops.product_edge`."""
    total = rows.sum()
    low, high = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for _ in range(ROUNDS):
        step = (high - low) / POINTS
        grid = low + step * torch.arange(1, POINTS, dtype=torch.float64)[:, None]
        p, q = grid[:, 0] / columns.max(), grid[:, 1] / rows.max()
        over_p = (columns / (1 - p[:, None] * columns)).sum(1) / total
        over_q = (rows / (1 - q[:, None] * rows)).sum(1) / total
        squares = torch.maximum(over_p[:, None] / q, over_q / p[:, None])
        i, j = divmod(int(squares.argmin()), len(q))
        best = torch.stack([grid[i, 0], grid[j, 1]])
        low, high = (best - 2 * step).clamp(min=0), (best + 2 * step).clamp(max=1)
    return float(squares.min().sqrt()), float(p[i])
