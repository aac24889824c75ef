"""The public settings: fixed before any data is seen, the same for all tasks of a store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lmcore.errors import UserError
from lmcore.random import key

if TYPE_CHECKING:
    from siftmasks.grid import Grid


@dataclass(frozen=True)
class SiftSettings:
    """How every task is trained and quantised. Nothing here may depend on a task's data: that is what makes forgetting exact.

    The defaults are the paper's (20 steps of Adam on all of a task's examples). Raises: `UserError` naming a setting out of range.
    """

    learning_rate: float = 1e-4
    """Adam's step size, constant over the steps."""
    steps: int = 20
    """Optimizer steps per task."""
    batch_size: int | None = None
    """Examples per step; None takes all of the task's examples at every step."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    bits: int = 8
    """Bits of a magnitude: the largest level is 2^bits - 1."""
    headroom: float = 2.0
    """The grid reaches headroom x learning_rate x steps; magnitudes beyond it saturate."""
    seed: int = 0
    """Seed of the sign vector and of every task's batches and dropout."""
    mode: Literal["sift", "signs"] = "sift"
    """sift: the paper's sign constraint. signs: no constraint, each task keeps its own signs."""
    density: float | None = None
    """Share of each tensor that stays: its largest magnitudes; None keeps all. Only for mode "sift", which has masks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in the forward and backward pass; the task vector is float32 in any case."""
    threads: int = 1
    """Threads of the CPU while a task is trained: another number may give other bits."""
    max_length: int = 512
    """Tokens of an example; a longer prompt loses its beginning."""
    freeze: Sequence[str] = ()
    """Regular expressions: parameters whose name has a match are left alone, besides the embeddings and the head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", tuple(self.freeze))  # JSON gives a list back
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "must be positive and finite")
        self._require("steps", self.steps >= 1, "must be at least 1")
        self._require("batch_size", self.batch_size is None or self.batch_size >= 1, "must be at least 1")
        self._require("beta1", 0 <= self.beta1 < 1, "must be in [0, 1)")
        self._require("beta2", 0 <= self.beta2 < 1, "must be in [0, 1)")
        self._require("eps", 0 < self.eps < math.inf, "must be positive and finite")
        self._require("bits", 1 <= self.bits <= 16, "must be from 1 to 16")
        self._require("headroom", 0 < self.headroom < math.inf, "must be positive and finite")
        self._require("seed", 0 <= self.seed < 2**64, "must be in [0, 2^64)")
        self._require("mode", self.mode in ("sift", "signs"), 'must be "sift" or "signs"')
        self._require("density", self.density is None or 0 < self.density <= 1, "must be in (0, 1]")
        masked = self.density is None or self.mode != "signs"
        self._require(
            "density", masked, 'must be None in mode "signs", which has no mask: what is left out would be served as -N'
        )
        self._require("dtype", self.dtype in ("float32", "bfloat16"), 'must be "float32" or "bfloat16"')
        self._require("threads", 1 <= self.threads <= 256, "must be from 1 to 256")
        self._require("max_length", self.max_length >= 2, "must be at least 2")

    @property
    def grid(self) -> "Grid":
        """The grid of magnitudes, made of the settings alone."""
        from siftmasks.grid import Grid

        return Grid.of(self.learning_rate, self.steps, self.bits, self.headroom)

    def task_seed(self, task: str) -> int:
        """The seed of a task, 64 bits: a hash of `seed` and the task's id, so that other tasks, and their number, play no part.

        >>> SiftSettings().task_seed("alice") == SiftSettings(steps=5).task_seed("alice") != SiftSettings().task_seed("bob")
        True
        """
        low, high = key(self.seed, f"task {task}")
        return low | high << 32

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}: it {rule}")
