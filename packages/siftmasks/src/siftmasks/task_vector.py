"""What one task adds to the ledger."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskVector:
    """The quantised task vector of one task: everything served, hashed and summed is made of it, never of the float one.

    `levels[name]` has the shape of the weight and the grid's `level_dtype`: n >= 0, for a magnitude of q n (q is the grid's step, in
    the weight's own unit). Where n > 0, the sign is that of the sign vector v (mode "sift", `signs` is None) or the task's own
    (mode "signs"): bit i of `signs[name]`, uint8 [ceil(size / 8)], is 1 where it is positive; bits are packed little-endian along the
    flat index, unused ones 0. These bits are no mask: a coordinate with n = 0 is served the others' N, as +N or
    -N by its bit. Names are those of the tensors in the base checkpoint. `saturated` counts coordinates beyond the grid.
    """

    levels: dict[str, Tensor]
    signs: dict[str, Tensor] | None
    saturated: int

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(levels.numel() for levels in self.levels.values())

    @property
    def density(self) -> float:
        """Share of the coordinates with n > 0: the density of the task's mask in mode "sift"."""
        return sum(int(levels.count_nonzero()) for levels in self.levels.values()) / max(self.size, 1)
