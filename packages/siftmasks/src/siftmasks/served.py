"""Served weights: base model, ledger and the bits of a task in one pass."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.random import key
from siftmasks.ops.apply_mask import apply_mask
from siftmasks.snapshot import Snapshot

Scale = Literal["mean", "count", "density"]


def served_weights(
    snapshot: Snapshot, base: Checkpoint, task: str | None, scale: Scale, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained tensors as they are served, sorted by name; memory: one tensor."""
    settings, factor = snapshot.config.settings, scale_factor(snapshot, scale)
    signed = settings.mode == "signs"
    for name in sorted(snapshot.config.tensors):
        yield name, apply_mask(
            base.tensor(name), snapshot.ledger("total", name), None if task is None else snapshot.mask(task, name),
            step=settings.grid.step, scale=factor, key=None if signed else key(settings.seed, name),
            count=snapshot.ledger("count", name) if factor is None else None,
            positive=snapshot.ledger("positive", name) if signed and task is None else None, dtype=dtype,
        )  # fmt: skip


def scale_factor(snapshot: Snapshot, scale: Scale) -> float | None:
    """Return what q N is multiplied by: 1/T ("mean"), weights / sum of C ("density"), or None ("count": divided by C at each weight).

    A store without tasks serves the base: its N is 0. Raises: `UserError` for another scale.
    """
    if scale == "count":
        return None
    if scale == "density":
        return snapshot.config.size / max(sum(snapshot.manifest.counts.values()), 1)
    if scale == "mean":
        return 1 / max(snapshot.manifest.tasks, 1)
    raise UserError(f"scale {scale}: choose mean, count or density")
