"""Methods that serve one task vector to all tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lmcore.random import uniform
from siftmasks.baselines.vectors import Vectors, magnitude_threshold, sum_over_tasks


@dataclass(frozen=True)
class Merged:
    """The same task vector for everyone."""

    tensors: Mapping[str, Tensor]

    def vector(self, task: str | None, name: str) -> Tensor:
        """What is added to the base weight `name`: float32."""
        return self.tensors[name]


def average(vectors: Vectors) -> Merged:
    """FT + Merge: `sum_t tau_t / T`. Forgetting a task is one subtraction (which in floating point is not exact).

    >>> from siftmasks.baselines import VectorsInMemory
    >>> vectors = VectorsInMemory({"a": {"w": torch.tensor([1.0, 4.0])}, "b": {"w": torch.tensor([3.0, -4.0])}})
    >>> average(vectors).vector("a", "w")
    tensor([2., 0.])

    Source: Wortsman et al. 2022, "Model soups"; the naive merge of Kuo et al. 2025.
    """
    return task_arithmetic(vectors, 1 / len(vectors.tasks))


def task_arithmetic(vectors: Vectors, scale: float) -> Merged:
    """`scale * sum_t tau_t`. Source: Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv 2212.04089)."""
    return _scaled_sum(vectors, scale, vectors.read)


def ties(vectors: Vectors, density: float = 0.2, scale: float = 1.0) -> Merged:
    """TIES: trim, elect a sign, average those that agree with it.

    Each task vector keeps the share `density` of its weights with the largest magnitudes, of all its tensors together (a global
    threshold, exact; magnitudes equal to it stay). The elected sign of a weight is that of the sum of what is left, and the result
    `scale` times the mean of the nonzero entries with that sign, 0 where the sum is 0. Forgetting a task repeats the election, which
    needs all the other task vectors.

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708).
    """
    threshold = {task: magnitude_threshold(partial(vectors.read, task), vectors.names, density) for task in vectors.tasks}

    def trimmed(task: str, name: str) -> Tensor:
        own = vectors.read(task, name)
        return own * (own.abs() >= threshold[task])

    merged = {}
    for name in vectors.names:
        elected = sum_over_tasks(vectors, name, trimmed).sign()
        total, count = torch.zeros_like(elected), torch.zeros_like(elected)
        for task in vectors.tasks:
            own = trimmed(task, name)
            agrees = own * elected > 0
            total += own * agrees
            count += agrees
        merged[name] = scale * total / count.clamp(min=1)
    return Merged(merged)


def dare(vectors: Vectors, drop: float, scale: float, seed: int = 0) -> Merged:
    """DARE before task arithmetic: `scale * sum_t keep_t * tau_t / (1 - drop)`.

    `keep_t` is 1 where the Philox uniform number of (seed, "task/name", flat index) is at least `drop`: it depends on no other task.

    Source: Yu et al. 2024, "Language models are Super Mario" (arXiv 2311.03099).
    """

    def kept(task: str, name: str) -> Tensor:
        own = vectors.read(task, name)
        keep = uniform(seed, f"{task}/{name}", own.numel(), device=own.device).view_as(own) >= drop
        return own * keep / (1 - drop)

    return _scaled_sum(vectors, scale, kept)


def breadcrumbs(vectors: Vectors, scale: float, low: float = 0.85, high: float = 0.99) -> Merged:
    """Model breadcrumbs: `scale * sum_t m_t * tau_t`, where the mask leaves out small weights and outliers.

    In each tensor (not globally) the n weights are ordered by magnitude; the ranks from `round(low * n)` to before `round(high * n)` stay.

    Source: Davari & Belilovsky 2024, "Model Breadcrumbs" (arXiv 2312.06795).
    """

    def between(task: str, name: str) -> Tensor:
        own = vectors.read(task, name)
        order = own.abs().flatten().argsort(stable=True)
        mask = torch.zeros(own.numel(), device=own.device)
        mask[order[round(low * len(order)) : round(high * len(order))]] = 1
        return own * mask.view_as(own)

    return _scaled_sum(vectors, scale, between)


def _scaled_sum(vectors: Vectors, scale: float, of: Callable[[str, str], Tensor]) -> Merged:
    return Merged({name: scale * sum_over_tasks(vectors, name, of) for name in vectors.names})
