"""The grid of levels that every task vector is rounded to: fixed by the configuration alone, before any data is seen."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """Levels 0, 1, ..., 2**bits - 1 of size `step`, a power of two: a coordinate of a task vector is `sign * step * level`.

    A step that depended on the data of a task would leave its trace in all other tasks. A power of two makes `step * level` exact, and with
    it every float32 sum of fewer than 2**(24 - bits) task vectors, in any order.

    >>> Grid(bits=8, step=2**-15).largest
    255

    Raises: `ValueError` unless 1 <= bits <= 16 and `step` is a power of two from 2**-126 to 2**126.
    """

    bits: int
    step: float

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}: a level has 1 to 16 bits")
        if not (2.0**-126 <= self.step <= 2.0**126 and math.frexp(self.step)[0] == 0.5):
            raise ValueError(f"step is {self.step}: expected a power of two from 2**-126 to 2**126")

    @staticmethod
    def of(learning_rate: float, steps: int, bits: int = 8, headroom: float = 2.0) -> "Grid":
        """Return the grid with `step = 2**ceil(log2(headroom * learning_rate * steps / 2**bits))`.

        Adam moves a coordinate by about `learning_rate` per step, so that `headroom` 2 leaves twice the room that most need; what lies
        beyond the largest level is rounded down to it and counted (see `ops.ledger_add`).

        >>> Grid.of(learning_rate=1e-4, steps=20)
        Grid(bits=8, step=3.0517578125e-05)

        Raises: `ValueError` unless the three factors are positive and finite; also as the class does.
        """
        reach = headroom * learning_rate * steps
        if not (learning_rate > 0 and steps > 0 and headroom > 0 and math.isfinite(reach) and reach > 0):
            raise ValueError(
                f"learning_rate {learning_rate}, steps {steps}, headroom {headroom}: all must be positive, and their product finite"
            )
        mantissa, exponent = math.frexp(reach)  # reach = mantissa * 2**exponent, 0.5 <= mantissa < 1: log2 would round
        return Grid(bits, math.ldexp(1.0, exponent - (mantissa == 0.5) - bits))

    @property
    def largest(self) -> int:
        """The largest level."""
        return 2**self.bits - 1

    @property
    def level_dtype(self) -> torch.dtype:
        """The dtype of levels: uint8 up to 8 bits, else uint16."""
        return torch.uint8 if self.bits <= 8 else torch.uint16

    def ledger_dtypes(self, max_tasks: int) -> tuple[torch.dtype, torch.dtype]:
        """Return the smallest of uint8, uint16 and uint32 for the total N and for the count C: no sum of `max_tasks` tasks overflows them.

        >>> Grid(bits=8, step=2**-15).ledger_dtypes(max_tasks=500)
        (torch.uint32, torch.uint16)

        Raises: `ValueError` unless 1 <= max_tasks and max_tasks * largest < 2**32.
        """
        if not 1 <= max_tasks * self.largest < 2**32:
            most = (2**32 - 1) // self.largest
            raise ValueError(f"max_tasks is {max_tasks}: a ledger of {self.bits}-bit levels holds 1 to {most} tasks")
        return _smallest(max_tasks * self.largest), _smallest(max_tasks)


def _smallest(largest: int) -> torch.dtype:
    return torch.uint8 if largest < 2**8 else torch.uint16 if largest < 2**16 else torch.uint32
