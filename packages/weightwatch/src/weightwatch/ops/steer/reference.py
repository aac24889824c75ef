"""Steering row by row in float64: the oracle of the kernels."""

import torch
from torch import Tensor

from weightwatch.ops.cos_minmax.reference import cosines

ROUNDS = 32  # of clamp, at most
SETTLED = 1e-5  # a change, as a share of |h|, that needs no further round
DEPENDENT = 1e-6  # eigenvalues of a Gram matrix below this share of the largest count as zero


def steer(
    hidden: Tensor, directions: Tensor, low: Tensor, high: Tensor, role: Tensor, sequence: Tensor, fired: Tensor,
    mode: str, scale: float | None, write: Tensor | None, gram: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the steered rows; with mode clamp, the last row of the bounds is that of role -1."""
    steered, cosine = hidden.clone(), cosines(hidden, directions)
    for row in range(len(hidden)):
        r, mask = int(role[row]), fired[sequence[row]]
        if r >= 0:
            mask |= ~((low[r] <= cosine[row]) & (cosine[row] <= high[r]))
        if not mask.any():
            continue
        h, units = hidden[row].double(), directions[mask].double()
        if cosine[row].isnan().any():
            steered[row] = torch.nan
        elif mode == "clamp":
            steered[row] = _clamp(h, units, low[r, mask].tolist(), high[r, mask].tolist())
        else:
            change = {"remove": -(units @ h), "scale": ((scale or 0.0) - 1) * (units @ h)}.get(mode)
            if change is None and write is not None:
                change = -write[row, mask].double()
            inverse = torch.linalg.pinv(units @ units.T, rtol=DEPENDENT, hermitian=True)
            steered[row] = h + units.T @ (inverse @ change)
    return steered


def _clamp(h: Tensor, units: Tensor, low: list[float], high: list[float]) -> Tensor:
    """Bring each cosine into its range, in turn, until all are.

    With `b = u·h' / |h'|` and what is orthogonal to u staying as it is, `u·h' = b |h - (u·h) u| / sqrt(1 - b²)`.
    """
    for _ in range(ROUNDS):
        settled = True
        for u, least, greatest in zip(units, low, high, strict=True):
            along, norm = float(u @ h), float(h.norm())
            cosine = along / norm if norm else 0.0
            bound = least if cosine < least else greatest if cosine > greatest else cosine
            if bound != cosine and abs(bound) < 1:
                rest = max(0.0, norm**2 - along**2) ** 0.5
                change = bound / (1 - bound**2) ** 0.5 * rest - along
                h = h + change * u
                settled &= abs(change) <= SETTLED * norm
        if settled:
            break
    return h
