"""Steering a live model: directions that leave their range are taken out of the residual stream, of that input alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmcore.errors import UserError
from weightwatch.batch import Batch
from weightwatch.bounds import Bounds
from weightwatch.conversations import ROLES
from weightwatch.directions import Bank
from weightwatch.ops.steer import steer
from weightwatch.pair import Pair, Source
from weightwatch.reading import Reading


@dataclass(frozen=True)
class Steering:
    """What becomes of a direction from the token on at which it leaves its range, to the end of the input.

    It applies to what a block returns, before the next one reads it, jointly for all directions of the block (see `ops.steer`):

    - `remove`: nothing is left along it (the paper's way);
    - `scale`: `factor` times what is there is left;
    - `clamp`: its cosine is brought back to the bound;
    - `revert`: what the fine-tune wrote along it is taken back. `writes` says how that is computed (`writes_of`).
    """

    mode: Literal["remove", "scale", "clamp", "revert"] = "remove"
    factor: float | None = None
    writes: Mapping[str, Float[Tensor, "t inputs"]] | None = None

    def __post_init__(self) -> None:
        if (self.mode == "scale") != (self.factor is not None):
            raise UserError(f"steering {self.mode} with the factor {self.factor}: scale needs one, the others take none")
        if self.factor is not None and not math.isfinite(self.factor):
            raise UserError(f"the factor of scale is {self.factor}: it must be finite")
        if (self.mode == "revert") != (self.writes is not None):
            raise UserError("steering needs writes to revert, and only then: see writes_of, or --base on the command line")


def writes_of(bank: Bank, base: Source, post: Source) -> dict[str, Float[Tensor, "t inputs"]]:
    """What the fine-tune made each residual writer of the watched blocks write along the directions, by the name of its module.

    `u_jᵀ Δ` for the directions u_j of the block and Δ = W_post - W_base of the writer: for its input x the fine-tune added `u_jᵀ Δ x` along
    u_j to the residual stream, in whole and not only by its leading singular vectors. What another part of the block makes of that (the
    MLP reads what the attention wrote) is not in it.

    Raises: `UserError` as `Pair.open`; where a norm stands between a writer and the stream, or a writer is a mixture of experts.
    """
    found = {}
    with Pair.open(base, post) as pair:
        for number, writer in enumerate(pair.writers.writers):
            if writer.layer not in bank.layers:
                continue
            [part, *others] = writer.parts
            if others or part.fused or writer.norms:
                what = "is followed by a norm" if writer.norms else "is a mixture of experts"
                raise UserError(f"{writer.name} {what}: what it writes cannot be reverted; remove, scale and clamp can")
            matrix = pair.difference(number).matrix
            found[part.tensor.removesuffix(".weight")] = bank.vectors[bank.layers.index(writer.layer)] @ matrix
    return found


class Steerer:
    """Steers the inputs under way, each by its own directions."""

    def __init__(self, steering: Steering, bank: Bank, bounds: Bounds):
        if (bounds.low > bounds.high).any():
            empty = next(role for i, role in enumerate(ROLES) if (bounds.low[i] > bounds.high[i]).any())
            raise UserError(
                f"the bounds have no range for the role {empty}: calibrate on conversations that have it before steering"
            )
        self._steering, self._bank = steering, bank
        ends = np.cumsum(bank.counts)[:-1]
        sides = [np.split(side, ends, axis=1) for side in (bounds.low, bounds.high)]
        self._blocks = [
            _Block(vectors, *_padded(low, high, len(vectors))) for vectors, low, high in zip(bank.vectors, *sides, strict=True)
        ]
        self._fired: dict[Batch, list[Bool[Tensor, "rows t"]]] = {}
        self._tokens: tuple[Reading, Tensor, Tensor] | None = None  # role and row of each token of the forward under way
        self._written: list[dict[str, Tensor]] = [{} for _ in bank.blocks]  # by writer

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Install what revert needs: hooks on the writers, which tell what they are given."""
        return [
            model.get_submodule(name).register_forward_pre_hook(self._note(name, writes))
            for name, writes in (self._steering.writes or {}).items()
        ]

    def steer(self, place: int, hidden: Float[Tensor, "rows columns d"], reading: Reading) -> Tensor:
        """Return what the block at this place in the bank is to return instead."""
        if reading.again:
            raise UserError("steering goes on from the token that fires, and so needs a cache: generate with use_cache=True")
        rows, columns, _ = hidden.shape
        device, written = hidden.device, [*self._written[place].values()]
        block = self._blocks[place] = self._blocks[place].to(device)
        fired = self._fired.setdefault(reading.batch, [])
        if len(fired) == place:
            with torch.inference_mode(False):  # it is changed later, perhaps outside of the caller's inference mode
                fired.append(torch.zeros(rows, len(block.vectors), dtype=torch.bool, device=device))
        if self._tokens is None or self._tokens[0] is not reading:  # the first block of this forward
            roles, _ = reading.batch.span(reading.start, reading.start + columns)
            self._tokens = reading, roles.flatten(), torch.arange(rows, device=roles.device).repeat_interleave(columns)
        _, role, row = self._tokens
        steered = steer(
            hidden.flatten(0, 1), block.vectors, block.low, block.high, role.to(device), row.to(device), fired[place],
            mode=self._steering.mode, scale=self._steering.factor, write=torch.stack(written).sum(0) if written else None, gram=block.gram,
        )  # fmt: skip
        return steered.view(hidden.shape)

    def fired(self, batch: Batch) -> Bool[np.ndarray, "rows directions"]:
        """Which directions are being steered in each input of a batch."""
        parts = [np.zeros((batch.rows, count), bool) for count in self._bank.counts]
        for place, fired in enumerate(self._fired.get(batch, [])):
            parts[place] = fired[:, : parts[place].shape[1]].cpu().numpy()
        return np.concatenate(parts, axis=1)

    def forget(self) -> None:
        """Drop all batches."""
        self._fired.clear()

    def _note(self, writer: str, writes: Tensor) -> Callable[[nn.Module, Any], None]:
        place = next(place for place, block in enumerate(self._bank.blocks) if writer.startswith(f"{block}."))

        @torch.compiler.disable
        def before_writer(module: nn.Module, args: Any) -> None:
            nonlocal writes
            writes = writes.to(args[0].device)
            with torch.no_grad():
                self._written[place][writer] = args[0].float().flatten(0, -2) @ writes.mT

        return before_writer


@dataclass(frozen=True)
class _Block:
    """The directions of a block and their ranges, [t, d] and [roles, t]."""

    vectors: Tensor
    low: Tensor
    high: Tensor
    gram: Tensor | None = None

    def to(self, device: torch.device) -> "_Block":
        if self.gram is not None and self.gram.device == device:
            return self
        vectors = self.vectors.to(device)
        return _Block(vectors, self.low.to(device), self.high.to(device), vectors @ vectors.mT)


def _padded(low: np.ndarray, high: np.ndarray, count: int) -> list[Tensor]:
    """Bounds with ranges for the zero rows that never end."""
    missing = ((0, 0), (0, count - low.shape[1]))
    return [torch.from_numpy(np.pad(side, missing, constant_values=end)) for side, end in ((low, -np.inf), (high, np.inf))]
