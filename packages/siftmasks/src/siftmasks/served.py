"""Served weights: base model, ledger and the bits of a task in one pass."""

from collections.abc import Iterator, Mapping
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
    served = Served(snapshot, scale)
    for name in sorted(snapshot.config.tensors):
        yield name, served.tensor(name, base.tensor(name), served.ledger(name), served.bits(name, task), dtype=dtype)


class Served:
    """What one version of a store serves at a scale. Raises: `UserError` for an unknown scale."""

    def __init__(self, snapshot: Snapshot, scale: Scale):
        self.snapshot, self._settings = snapshot, snapshot.config.settings
        self._factor = scale_factor(snapshot, scale)

    def ledger(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read the parts of the ledger that one tensor is served from: N, C without a factor, P in mode "signs"."""
        parts = [part for part in self.snapshot.config.parts if part != "count" or self._factor is None]
        return {part: self.snapshot.ledger(part, name).to(device) for part in parts}

    def bits(self, name: str, task: str | None, device: torch.device | str = "cpu") -> Tensor | None:
        """Read the bits of a task for one tensor; of None, the maskless model, there are none."""
        return None if task is None else self.snapshot.mask(task, name).to(device)

    def tensor(
        self, name: str, base: Tensor, ledger: Mapping[str, Tensor], bits: Tensor | None,
        *, dtype: torch.dtype | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return one tensor as it is served, of `dtype` (None: the base's) or in `out`; from a base of zeros, its delta."""
        return apply_mask(
            base, ledger["total"], bits, step=self._settings.grid.step, scale=self._factor,
            key=None if self._settings.mode == "signs" else key(self._settings.seed, name),
            count=ledger.get("count"), positive=ledger.get("positive") if bits is None else None, dtype=dtype, out=out,
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
