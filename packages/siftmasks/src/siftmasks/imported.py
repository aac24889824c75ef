"""Task vectors of checkpoints that were trained elsewhere, quantised and added a tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.base_model import same_bits
from siftmasks.config import StoreConfig
from siftmasks.ops.ledger_add import ledger_add
from siftmasks.recorded import TaskWriter, read_tensor
from siftmasks.sift import prune
from siftmasks.signs import sign_vector


@dataclass(frozen=True)
class Imported:
    """How well a task vector fitted the store, which is not the store's to keep."""

    saturated: int
    """Coordinates beyond the grid, cut to its largest level."""
    lost: float
    """Share of the squared length that was dropped against the sign vector or by `density`: about half without the sign constraint."""


class ImportedTask:
    """τ = float32(θ) - float32(θ0) of one checkpoint θ; in mode "sift", what lies against the sign vector is dropped."""

    def __init__(self, source: Checkpoint, writer: TaskWriter, shared: "SharedTensors"):
        self._source, self._writer, self._shared = source, writer, shared
        self._saturated = 0
        self._before = self._after = 0.0

    def report(self) -> Imported:
        """What there is to tell, once all tensors are added."""
        return Imported(self._saturated, 1 - self._after / self._before if self._before else 0.0)

    def add_to(self, name: str, ledger: dict[str, Tensor]) -> None:
        """Quantise one tensor, add it to the ledger and write its levels and bits. Raises: `UserError` for NaN or infinity."""
        settings = self._shared.settings
        base, sign = self._shared.get(name)
        task_vector = read_tensor(self._source.tensors[name]).float().sub_(base)
        before = _energy(task_vector)
        if not before < float("inf"):
            raise UserError(f"{self._source.path}: {name} has NaN or infinity, or values as large as these")
        if sign is not None:  # τ v instead of τ: magnitudes are all that is taken from here
            task_vector.mul_(sign).clamp_(min=0)
        if settings.density is not None:
            task_vector = prune(task_vector, settings.density)
        self._before += before
        self._after += _energy(task_vector) if sign is not None else before
        grid = settings.grid
        levels, bits, saturated = ledger_add(
            task_vector, ledger["total"], ledger["count"], step=grid.step, bits=grid.bits, positive=ledger.get("positive")
        )
        self._saturated += saturated
        self._writer.write(name, levels, bits)


class SharedTensors:
    """The base weights (float32) and signs of the tensor that is at hand: all tasks add it before the next one comes."""

    def __init__(self, base: Checkpoint, config: StoreConfig):
        self._base, self.settings = base, config.settings
        self._name = ""
        self._tensors: tuple[Tensor, Tensor | None] = (torch.empty(0), None)

    def get(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Base weights and, in mode "sift", the sign vector."""
        if name != self._name:
            base = self._base.tensor(name).float()
            sign = sign_vector(self.settings.seed, name, base.shape).float() if self.settings.mode == "sift" else None
            self._name, self._tensors = name, (base, sign)
        return self._tensors


def check_checkpoints(sources: Mapping[str, Checkpoint], base: Checkpoint, config: StoreConfig) -> None:
    """Check that each checkpoint has the tensors of the base, and differs from it in those alone that the store trains.

    The others have the base's bits, once in its dtype, whatever that is.

    Raises: `UserError` naming checkpoint and tensor.
    """
    for source in sources.values():
        for name in sorted(source.tensors.keys() | base.tensors.keys()):
            shapes = [checkpoint.tensors[name].shape if name in checkpoint.tensors else None for checkpoint in (source, base)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{source.path}: {name} has the shape {shapes[0]}, in the base {shapes[1]}: it is not a fine-tune of it"
                )
    for name in sorted(base.tensors.keys() - config.tensors.keys()):
        frozen = base.tensor(name)
        for source in sources.values():
            if not same_bits(read_tensor(source.tensors[name]).to(frozen.dtype), frozen):
                raise UserError(
                    f"{source.path}: {name} differs from the base, but this store does not train it: init one that names it as trainable"
                )


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
