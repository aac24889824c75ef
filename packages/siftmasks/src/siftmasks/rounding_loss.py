"""What rounding to a dtype leaves of a delta that is small beside its weights."""

import math

import torch
from torch import Tensor

Report = dict[str, dict[str, float | None]]

_BLOCK = 2**15
"""Coordinates summed at a time: few enough for one thread, so that sums do not depend on how many there are."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RoundingLoss:
    """Sums over tensors, for the exported dtypes ("exported") and as if all were float32, bfloat16 or float16.

    With θ0 the base, δ the delta in float32 and r the rounding to the dtype, a weight moves by `r(θ0 + δ) - r(θ0)` instead of δ.
    `unchanged`: share of the coordinates with δ ≠ 0 that do not move. `energy_lost`: `Σ (r(θ0 + δ) - r(θ0) - δ)² / Σ δ²`, 0 where
    rounding does nothing, 1 where the delta is swallowed, more where rounding moves weights further than the delta; None where the dtype
    overflows. Without a delta both are 0.

    >>> loss = RoundingLoss()
    >>> base, delta = torch.ones(4), torch.tensor([0.0, 2**-7, 2**-12, -(2**-12)])
    >>> loss.add(base, delta, (base + delta).bfloat16())
    >>> round(loss.report()["exported"]["unchanged"], 3), round(loss.report()["exported"]["energy_lost"], 5)
    (0.667, 0.00195)
    """

    def __init__(self) -> None:
        self._moved_by_delta, self._energy = 0, 0.0
        self._unchanged = dict.fromkeys(["exported", *_DTYPES], 0)
        self._lost = dict.fromkeys(["exported", *_DTYPES], 0.0)

    def add(self, base: Tensor, delta: Tensor, exported: Tensor) -> None:
        """Add a tensor: its base weights, its delta in float32, and the weights that are exported, all on the CPU and of one shape."""
        blocks = (tensor.reshape(-1).split(_BLOCK) for tensor in (base, delta, exported))
        for start, step, stop in zip(*blocks, strict=True):
            start, moved = start.float(), step != 0
            self._moved_by_delta += int(moved.sum())
            self._energy += _energy(step.double())
            results = {"exported": stop} | {dtype: (start + step).to(dtype) for dtype in _DTYPES}
            for name, result in results.items():
                way = result.double() - start.to(result.dtype).double()
                self._unchanged[name] += int((moved & (way == 0)).sum())
                self._lost[name] += _energy(way - step)

    def report(self) -> Report:
        """Return the shares by "exported", "float32", "bfloat16" and "float16"."""
        return {
            str(name).removeprefix("torch."): {
                "unchanged": self._unchanged[name] / max(self._moved_by_delta, 1),
                "energy_lost": self._lost[name] / (self._energy or 1.0) if math.isfinite(self._lost[name]) else None,
            }
            for name in self._lost
        }


def _energy(difference: Tensor) -> float:
    return float((difference * difference).sum())
