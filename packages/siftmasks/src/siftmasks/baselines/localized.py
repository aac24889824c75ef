"""Methods that give each task a mask or signs of its own, one bit per weight, and a scale; and Consensus, which counts masks.

The bits are derived from the task vector whenever they are asked for, so that memory does not grow with the number of tasks; who deploys
such a method stores them instead, at 1/32 of a float32 model per task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from siftmasks.baselines.merged import Merged, average
from siftmasks.baselines.vectors import Vectors, magnitude_threshold, sum_over_tasks


@dataclass(frozen=True)
class Localized:
    """A merged task vector of which each task gets its part; a user without a task gets all of it."""

    merged: Mapping[str, Tensor]
    part: Callable[[str, str], Tensor]

    def vector(self, task: str | None, name: str) -> Tensor:
        """What is added to the base weight `name`: float32."""
        return self.merged[name] if task is None else self.part(task, name)


@dataclass(frozen=True)
class Compressed:
    """Each task vector on its own, compressed or whole; nothing is merged, so a user without a task gets the base model."""

    vectors: Vectors
    compress: Callable[[Tensor], Tensor]

    def vector(self, task: str | None, name: str) -> Tensor:
        """What is added to the base weight `name`: float32."""
        if task is None:
            return torch.zeros_like(self.vectors.read(self.vectors.tasks[0], name))
        return self.compress(self.vectors.read(task, name))


def tall_masks(vectors: Vectors, density: float, scale: float = 1.0) -> Localized:
    """TALL-masks: `scale * m_t * tau` with `tau = sum_t tau_t / T` and `m_t = 1{|tau_t| >= lambda_t |tau - tau_t|}`.

    `lambda_t` is such that the mask has the density asked for, over all tensors of a task together (global, exact; ties stay). Masks
    depend on the merged vector: forgetting a task changes all of them. Merging by average, density and scale are how Kuo et al. 2025
    run it; the original merges by a scaled sum and chooses lambda on validation data.

    Source: Wang et al. 2024, "Localizing task information for improved model merging and compression" (arXiv 2405.07813).
    """
    merged = average(vectors).tensors
    masks = _tall_masks(vectors, merged, density)
    return Localized(merged, lambda task, name: scale * merged[name] * masks(task, name))


def consensus(vectors: Vectors, density: float, at_least: int = 2, scale: float = 1.0) -> Merged:
    """Consensus: `scale * sum_t tau_t / T` where at least `at_least` of the masks of `tall_masks` are 1, and 0 elsewhere.

    One vector for all tasks, without masks to store; forgetting a task changes it like `tall_masks`. Source: Wang et al. 2024.
    """
    merged = average(vectors).tensors
    masks = _tall_masks(vectors, merged, density)
    return Merged({n: scale * merged[n] * (sum_over_tasks(vectors, n, masks) >= at_least) for n in vectors.names})


def _tall_masks(vectors: Vectors, merged: Mapping[str, Tensor], density: float) -> Callable[[str, str], Tensor]:
    """The mask (0 and 1) of a task and tensor, as a function."""

    def ratio(task: str, name: str) -> Tensor:
        """What lambda is compared with: infinite where only the divisor is 0, and 0 where both are."""
        own = vectors.read(task, name)
        return (own.abs() / (merged[name] - own).abs()).nan_to_num(nan=0.0, posinf=torch.inf)

    threshold = {task: magnitude_threshold(partial(ratio, task), vectors.names, density) for task in vectors.tasks}
    return lambda task, name: (ratio(task, name) >= threshold[task]).float()


def emr(vectors: Vectors) -> Localized:
    """EMR: elect a unified vector, mask it, rescale it: `lambda_t * m_t * u`.

    `u` has, per weight, the sign of the sum over tasks and the largest magnitude among the tasks with that sign (0 where the sum is 0);
    `m_t = 1{tau_t * u > 0}`; `lambda_t = sum |tau_t| / sum |m_t * u|`, over all tensors of a task together. Forgetting a task repeats the
    election, from all the other task vectors. A user without a task gets `u`.

    Source: Huang et al. 2024, "EMR-Merging" (arXiv 2405.17461).
    """
    unified = {}
    for name in vectors.names:
        sign = sum_over_tasks(vectors, name, vectors.read).sign()
        largest = torch.zeros_like(sign)
        for task in vectors.tasks:
            largest = torch.maximum(largest, vectors.read(task, name) * sign)
        unified[name] = sign * largest

    def masked(task: str, name: str) -> Tensor:
        return unified[name] * (vectors.read(task, name).sign() * unified[name] > 0)

    rescale = {}
    for task in vectors.tasks:
        own_size = masked_size = 0.0
        for name in vectors.names:
            own_size += vectors.read(task, name).abs().sum(dtype=torch.float64).item()
            masked_size += masked(task, name).abs().sum(dtype=torch.float64).item()
        rescale[task] = own_size / masked_size if masked_size else 0.0
    return Localized(unified, lambda task, name: rescale[task] * masked(task, name))


def bitdelta(vectors: Vectors) -> Compressed:
    """BitDelta: the signs of each task vector times its mean magnitude per tensor: `mean|tau_t| * (+1 where tau_t > 0, else -1)`.

    Forgetting a task is deleting its file. Not done here: the original then distils the scales on data, and leaves all but the linear
    layers as they are.

    Source: Liu et al. 2024, "BitDelta" (arXiv 2402.10193).
    """
    return Compressed(vectors, lambda own: own.abs().mean() * torch.where(own > 0, 1.0, -1.0))


def mask_only(vectors: Vectors) -> Compressed:
    """SIFT's masks without a merged vector: `s * sign(tau_t)`, with s the mean magnitude of the nonzero weights of the tensor.

    For task vectors of SIFT `sign(tau_t) = v * m_t`, so a task stores its mask and a scale per tensor. Forgetting a task is deleting them.
    It shows what the merged vector of SIFT-Masks adds to its masks.
    """
    return Compressed(vectors, lambda own: own.sign() * (own.abs().sum() / own.count_nonzero().clamp(min=1)))


def local(vectors: Vectors) -> Compressed:
    """Local fine-tuning: every task gets its own task vector, all of it; one model per task is stored."""
    return Compressed(vectors, lambda own: own)
