"""The extremes of the inputs under way, from what the watched blocks return."""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmcore.errors import UserError
from weightwatch.batch import Batch
from weightwatch.bounds import Extremes
from weightwatch.conversations import ROLES
from weightwatch.directions import Bank
from weightwatch.ops.cos_minmax import CosineRange, cos_minmax
from weightwatch.reading import Reading

COLUMNS = 64
"""Tokens per row that are measured together; a longer forward is measured block by block, at once."""


class Peaks(NamedTuple):
    """The extremes of inputs, and the positions of the tokens that have them: -1 for a role without tokens."""

    low: Extremes
    high: Extremes
    low_at: Int64[np.ndarray, "inputs roles directions"]
    high_at: Int64[np.ndarray, "inputs roles directions"]


class Recorder:
    """Keeps what blocks return until it is worth measuring, and the extremes of each batch.

    A token that is decoded costs a reference to one hidden state per block: these are measured `COLUMNS` at a time, all blocks of a
    device in one call, or when somebody asks. Nothing here waits for a GPU; vectors go to a device once, extremes stay there.
    """

    def __init__(self, bank: Bank):
        self._bank = bank
        self._vectors: dict[torch.device, Tensor] = {}
        self._ranges: dict[tuple[Batch, torch.device], CosineRange] = {}  # [blocks, rows * roles, t], with positions for rows
        self._forward: list[_Kept] = []  # of the forward under way
        self._waiting: list[tuple[Reading, list[_Kept]]] = []  # forwards of one batch, one after the other

    def add(self, place: int, hidden: Float[Tensor, "rows columns d"], reading: Reading) -> None:
        """Take what the block at this place in the bank returned; blocks come in their order."""
        if reading.again:
            hidden = hidden[:, reading.again :]
        if reading.columns >= COLUMNS:
            self.measure()
            self._measure(place, hidden[None], reading.batch, reading.start)
            return
        if place == 0:
            self._forward = []
        # Not copied, as blocks add out of place; an inference tensor does not tell whether one did not.
        inference = hidden.is_inference()
        self._forward.append((hidden.clone(), 0) if inference else (hidden, hidden._version))
        if place == len(self._bank.blocks) - 1:
            if self._waiting and self._waiting[0][0].batch is not reading.batch:
                self.measure()
            self._waiting.append((reading, self._forward))
            if reading.start + reading.columns - self._waiting[0][0].start >= COLUMNS:
                self.measure()

    def measure(self) -> None:
        """Measure what is waiting."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        (first, _), place = waiting[0], 0
        of_blocks = (self._together(place, kept) for place, kept in enumerate(zip(*(kept for _, kept in waiting), strict=True)))
        for _, on_device in groupby(of_blocks, key=lambda hidden: hidden.device):
            hidden = torch.stack([*on_device])
            self._measure(place, hidden, first.batch, first.start)
            place += len(hidden)

    def peaks(self, batch: Batch) -> Peaks:
        """The extremes of the inputs of a batch, of all that was measured."""
        blocks, rows, roles, t = len(self._bank.blocks), batch.rows, len(ROLES), self._bank.vectors.shape[1]
        total = _nothing((blocks, rows * roles, t), torch.device("cpu"))
        for (owner, _), found in self._ranges.items():
            if owner is batch:
                total = _outermost(total, CosineRange(*(part.cpu() for part in found)))
        real = [place * t + i for place, count in enumerate(self._bank.counts) for i in range(count)]  # not the zero rows
        parts = (part.unflatten(1, (rows, roles)).permute(1, 2, 0, 3).flatten(2)[..., real] for part in total)
        return Peaks(*(part.numpy() for part in parts))

    def forget(self) -> None:
        """Drop all batches."""
        self._waiting.clear()
        self._ranges.clear()

    def _together(self, place: int, kept: "tuple[_Kept, ...]") -> Float[Tensor, "rows columns d"]:
        if any(not hidden.is_inference() and hidden._version != version for hidden, version in kept):
            block = self._bank.blocks[place]
            raise UserError(
                f"what {block} returned was changed in place by the model: run it under torch.inference_mode() to watch it"
            )
        return torch.cat([hidden for hidden, _ in kept], 1)

    def _measure(self, place: int, hidden: Float[Tensor, "blocks rows columns d"], batch: Batch, start: int) -> None:
        """Take in the columns from `start` on of a batch, for the blocks from `place` on."""
        device, blocks = hidden.device, slice(place, place + len(hidden))
        # What is made here is changed later, perhaps outside of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if device not in self._vectors:
                self._vectors[device] = self._bank.vectors.to(device)
            roles, positions = (part.to(device) for part in batch.span(start, start + hidden.shape[2]))
            row = torch.arange(batch.rows, device=device)[:, None]
            group = torch.where(roles < 0, -1, row * len(ROLES) + roles).flatten()
            found = cos_minmax(hidden.flatten(1, 2), self._vectors[device][blocks], group, batch.rows * len(ROLES))
            found = CosineRange(found.low, found.high, *(positions.flatten()[at] for at in (found.low_at, found.high_at)))
            if (batch, device) not in self._ranges:
                self._ranges[batch, device] = _nothing((len(self._bank.blocks), *found.low.shape[1:]), device)
            total = self._ranges[batch, device]
            for whole, part in zip(total, _outermost(CosineRange(*(one[blocks] for one in total)), found), strict=True):
                whole[blocks] = part


def start_numba() -> None:
    """Let numba start its threads now, and torch keep as many as it has.

    Numba starts them with its first parallel loop, here in the middle of a forward, and changes how many torch uses: the blocks before and
    after would round differently.
    """
    import numba

    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


_Kept = tuple[Tensor, int]  # what a block returned, and how often it had been written to by then


def _nothing(shape: tuple[int, ...], device: torch.device) -> CosineRange:
    low = torch.full(shape, torch.inf, device=device)
    at = torch.full(shape, -1, device=device)
    return CosineRange(low, -low, at, at.clone())


def _outermost(one: CosineRange, other: CosineRange) -> CosineRange:
    """The lower of the lows and the higher of the highs; NaN is outside of all numbers, and stays."""
    lower = (other.low < one.low) | other.low.isnan()
    higher = (other.high > one.high) | other.high.isnan()
    return CosineRange(
        torch.where(lower, other.low, one.low), torch.where(higher, other.high, one.high),
        torch.where(lower, other.low_at, one.low_at), torch.where(higher, other.high_at, one.high_at),
    )  # fmt: skip
