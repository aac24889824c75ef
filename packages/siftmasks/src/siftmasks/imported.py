"""Task vectors of checkpoints that were trained elsewhere, quantised a tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.random import key
from siftmasks.base_model import same_bits
from siftmasks.config import StoreConfig
from siftmasks.ops.arguments import FLOATS
from siftmasks.ops.ledger_add import quantize_difference
from siftmasks.recorded import TaskWriter, read_tensor
from siftmasks.settings import SiftSettings
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
    """τ = float32(θ) - float32(θ0) of one checkpoint θ; in mode "sift", what lies against the sign vector is dropped.

    `base_tensor` gives the tensors of θ0, and may be called from several threads.
    """

    def __init__(self, source: Checkpoint, writer: TaskWriter, settings: SiftSettings, base_tensor: Callable[[str], Tensor]):
        self._source, self._writer, self._settings, self._base_tensor = source, writer, settings, base_tensor
        self._saturated = 0
        self._energy = self._kept = 0.0

    def report(self) -> Imported:
        """What there is to tell, once all tensors are added."""
        return Imported(self._saturated, 1 - self._kept / self._energy if self._energy else 0.0)

    def levels(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Quantise one tensor, and write and return its levels and, in mode "signs", its packed signs.

        Raises: `UserError` for NaN or infinity.
        """
        settings, grid = self._settings, self._settings.grid
        sift = key(settings.seed, name) if settings.mode == "sift" else None
        weight, base = (_as_float(tensor) for tensor in (read_tensor(self._source.tensors[name]), self._base_tensor(name)))
        try:
            found = quantize_difference(weight, base, key=sift, step=grid.step, bits=grid.bits)
        except ValueError as error:  # shapes and dtypes fit: it is about NaN and infinity
            raise UserError(f"{self._source.path}: {name} has NaN or infinity ({error})") from None
        if settings.density is not None:
            task_vector = weight.float() - base.float()
            along = task_vector.where(task_vector * sign_vector(settings.seed, name, weight.shape) > 0, 0)
            pruned = quantize_difference(prune(along, settings.density), None, key=sift, step=grid.step, bits=grid.bits)
            found = pruned._replace(energy=found.energy)
        self._saturated += found.saturated
        self._energy += found.energy
        self._kept += found.kept
        self._writer.write(name, found.levels, found.bits)
        return found.levels, found.bits if sift is None else None


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


def _as_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in FLOATS else tensor.float()
