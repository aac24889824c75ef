"""SIFT-Masks in memory: what a `Store` keeps on disk, for comparisons over hundreds of small models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcore.random import key
from siftmasks.ops.apply_mask import apply_mask
from siftmasks.ops.ledger_add import ledger_add, ledger_add_levels, ledger_subtract
from siftmasks.settings import SiftSettings

Tensors = dict[str, Tensor]


class MemoryLedger:
    """The ledger of `tasks` in either mode, made and undone by the ops of the store; also a source of task vectors, those on the grid.

    `parts[name]` holds total, count and in mode "signs" positive; `levels[task][name]` and `bits[task][name]` are what a task added.
    """

    def __init__(self, settings: SiftSettings, like: Mapping[str, Tensor], *, max_tasks: int):
        total, count = settings.grid.ledger_dtypes(max_tasks)
        dtypes = {"total": total, "count": count} | ({"positive": total} if settings.mode == "signs" else {})
        self.settings, self.names, self.saturated = settings, [*like], 0
        self.parts = {
            name: {part: torch.zeros(tensor.shape, dtype=dtype) for part, dtype in dtypes.items()}
            for name, tensor in like.items()
        }
        self.levels: dict[str, Tensors] = {}
        self.bits: dict[str, Tensors] = {}

    @property
    def tasks(self) -> list[str]:
        """The tasks that are in the ledger, in the order in which they were learned."""
        return [*self.levels]

    def learn(self, task: str, task_vector: Mapping[str, Tensor]) -> None:
        """Round a float32 task vector to the grid and add it."""
        grid, levels, bits = self.settings.grid, {}, {}
        for name, parts in self.parts.items():
            levels[name], bits[name], beyond = ledger_add(task_vector[name], **parts, step=grid.step, bits=grid.bits)
            self.saturated += beyond
        self.levels[task], self.bits[task] = levels, bits

    def forget(self, task: str, levels: Mapping[str, Tensor]) -> None:
        """Subtract the levels of a task, derived again, and drop its bits. Raises: `ValueError` if they are not what was added."""
        wrong = [name for name in self.names if not torch.equal(levels[name], self.levels[task][name])]
        if wrong:
            raise ValueError(f"task {task} is not what was learned: it differs in {wrong}")
        for name, parts in self.parts.items():
            ledger_subtract(levels[name], **parts, **self._signs(task, name))
        del self.levels[task], self.bits[task]

    def read(self, task: str, name: str) -> Tensor:
        """One tensor of a task vector on the grid, float32."""
        return self.apply(name, self.levels[task][name], self.bits[task][name], scale=1.0)

    def served(self, scale: str) -> "ServedLedger":
        """What the ledger serves, as it is now: q N / T ("mean", the paper), q N d / sum C ("density") or q N / C ("count")."""
        share = self.density if scale == "density" else 1
        return ServedLedger(self, None if scale == "count" else 1 / (len(self.tasks) * share))

    @property
    def density(self) -> float:
        """Mean share of the weights that a task moves: sum C / (T d)."""
        used = sum(int(parts["count"].long().sum()) for parts in self.parts.values())
        return used / (len(self.tasks) * sum(parts["count"].numel() for parts in self.parts.values()))

    def differing(self) -> int:
        """At how many coordinates the ledger is not what its tasks give when added anew, last one first: 0 if forgetting is exact."""
        different = 0
        for name, parts in self.parts.items():
            anew = {part: torch.zeros_like(tensor) for part, tensor in parts.items()}
            for task in reversed(self.tasks):
                ledger_add_levels(self.levels[task][name], **anew, **self._signs(task, name))
            unequal = [parts[part].long() != anew[part].long() for part in parts]
            different += int(torch.stack(unequal).any(0).sum())
        return different

    def _signs(self, task: str, name: str) -> Tensors:
        return {"signs": self.bits[task][name]} if self.settings.mode == "signs" else {}

    def apply(self, name: str, total: Tensor, bits: Tensor | None, **options: Any) -> Tensor:
        """`ops.apply_mask` on base weights of 0, which gives the task vector itself."""
        shared = None if self.settings.mode == "signs" else key(self.settings.seed, name)
        return apply_mask(torch.zeros(total.shape), total, bits, step=self.settings.grid.step, key=shared, **options)


@dataclass(frozen=True)
class ServedLedger:
    """A ledger and what q N is multiplied by (None: 1 / C)."""

    ledger: MemoryLedger
    factor: float | None

    def vector(self, task: str | None, name: str) -> Tensor:
        """What is added to the base weight `name` for `task`, or for a user without a mask (None): float32."""
        parts = self.ledger.parts[name]
        bits = None if task is None else self.ledger.bits[task][name]
        count = parts["count"] if self.factor is None else None
        positive = parts.get("positive") if task is None else None
        return self.ledger.apply(name, parts["total"], bits, scale=self.factor, count=count, positive=positive)
