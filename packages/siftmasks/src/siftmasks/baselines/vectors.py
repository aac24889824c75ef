"""Where task vectors come from, and what a method makes of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Vectors(Protocol):
    """Task vectors by task and name of the tensor; the same tensor may be read several times."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks, in the order of sums."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The names of the tensors."""
        ...

    def read(self, task: str, name: str) -> Tensor:
        """One tensor of a task vector, float32."""
        ...


@runtime_checkable
class Served(Protocol):
    """What a method serves."""

    def vector(self, task: str | None, name: str) -> Tensor:
        """What is added to the base weight `name` for `task`, or for a user without a task (None): float32."""
        ...


class VectorsInMemory:
    """Task vectors that are held as tensors: {task: {name: task vector}}."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]]):
        self.tasks = [*tensors]
        self.names = [*tensors[self.tasks[0]]]
        self.tensors = tensors

    def read(self, task: str, name: str) -> Tensor:
        """One tensor of a task vector, float32."""
        return self.tensors[task][name].float()


def sum_over_tasks(vectors: Vectors, name: str, of: Callable[[str, str], Tensor]) -> Tensor:
    """`sum_t of(t, name)`, in the order of the tasks, two tensors at a time."""
    first, *others = vectors.tasks
    total = of(first, name).clone()
    for task in others:
        total += of(task, name)
    return total


def magnitude_threshold(read: Callable[[str], Tensor], names: Sequence[str], density: float) -> float:
    """The smallest of the `round(density * d)` (at least 1) largest magnitudes among all d entries of the tensors that `read` gives.

    Exact, in two passes with 65,536 counters: the bits of non-negative float32 numbers, read as integers, are ordered as the numbers
    are, so the first pass counts upper halves, which tells that of the answer, and the second the lower halves beside it. No entry
    may be NaN.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density {density} is not between 0 and 1")
    counts = _counts(_bits(read(name)) >> 16 for name in names)
    upper, rank = _digit(counts, max(round(density * int(counts.sum())), 1))
    lower, _ = _digit(_counts(bits[bits >> 16 == upper] & 0xFFFF for bits in (_bits(read(name)) for name in names)), rank)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: Tensor) -> Tensor:
    return piece.abs().contiguous().view(torch.int32).flatten()


def _counts(digits: Iterator[Tensor]) -> Tensor:
    return sum((torch.bincount(digit, minlength=65536) for digit in digits), torch.zeros(65536, dtype=torch.int64))


def _digit(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the entry of a rank (1 is the largest), and its rank among those with the same digit."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    digit = int((at_least >= rank).nonzero().max())
    return digit, rank - int(at_least[digit] - counts[digit])
