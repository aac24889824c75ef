"""The tokens that drive each direction furthest over a corpus, in memory that does not grow with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64
from transformers import PreTrainedModel

from lmcore.errors import UserError
from weightwatch.bounds import Extremes, check_extremes, read_state, write_state
from weightwatch.conversations import ROLES, TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.events import SIDES
from weightwatch.recording import Peaks
from weightwatch.scanning import scan

BINS = 256
"""Of the histograms, over cosines from -1 to 1."""


class TopTokens:
    """Per role, direction and side the `top` inputs that go furthest out, each with its cosine and the token where; and histograms.

    Inputs are added in their order; with equal cosines the earlier comes first, so the content depends on the inputs alone. With t
    directions it takes t (80 top + 32 `BINS`) bytes: 12 MB for t = 1160 and the defaults, whatever the number of inputs.
    """

    def __init__(self, directions: str, count: int, *, top: int = 32):
        if count < 1 or top < 1:
            raise ValueError(f"{count} directions, top {top}: too few")
        shape = (len(ROLES), count, len(SIDES))
        self.directions = directions
        """The digest of the directions."""
        self.inputs = 0
        self.inputs_with_role = np.zeros(len(ROLES), np.int64)
        self.outward = np.full((*shape, top), -np.inf, np.float32)
        """Minus the least cosine of an input (side 0) or the greatest (side 1), falling; -inf where there are fewer inputs."""
        self.input = np.full((*shape, top), -1, np.int64)
        self.position = np.full((*shape, top), -1, np.int64)
        self.histogram = np.zeros((*shape, BINS), np.int64)
        """Inputs per bin of their least (side 0) and greatest (side 1) cosine."""

    def add(self, peaks: Peaks) -> None:
        """Add the next inputs: a segmented merge of each column's `top` with the new values, in the columns where one of them enters.

        Raises: `UserError` for NaN, or extremes of other directions.
        """
        check_extremes(peaks.low, peaks.high, self.outward.shape[:2])
        there = peaks.high > -np.inf  # [inputs, roles, directions]
        self.inputs_with_role += there.any(2).sum(0)
        for side, (cosine, at) in enumerate(((peaks.low, peaks.low_at), (peaks.high, peaks.high_at))):
            self._count(side, cosine, there)
            outward = np.moveaxis(-cosine if side == 0 else cosine, 0, -1)  # [roles, directions, inputs]
            enters = np.any(outward > self.outward[:, :, side, -1:], axis=-1)
            if enters.any():
                self._merge(side, enters, outward[enters], np.moveaxis(at, 0, -1)[enters])
        self.inputs += len(peaks.low)

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        facts = {"directions": self.directions, "inputs": self.inputs}
        write_state(path, "top tokens", {name: getattr(self, name) for name in _ARRAYS}, facts)

    @classmethod
    def load(cls, path: Path, *, directions: str) -> "TopTokens":
        """Read the state. Raises: `UserError` for another or damaged file, or directions of another digest."""
        arrays, facts = read_state(path, "top tokens", directions)
        _, count, _, top = arrays["outward"].shape
        tokens = cls(directions, count, top=top)
        tokens.inputs = facts["inputs"]
        for name in _ARRAYS:
            setattr(tokens, name, arrays[name])
        return tokens

    def _count(self, side: int, cosine: Extremes, there: Bool[np.ndarray, "inputs roles directions"]) -> None:
        _, roles, directions = cosine.shape
        column = np.arange(roles * directions).reshape(roles, directions)
        at = np.clip(np.floor((cosine[there] + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        found = np.bincount(np.broadcast_to(column, cosine.shape)[there] * BINS + at, minlength=roles * directions * BINS)
        self.histogram[:, :, side] += found.reshape(roles, directions, BINS)

    def _merge(
        self, side: int, columns: Bool[np.ndarray, "roles directions"], outward: Float32[np.ndarray, "entering inputs"],
        position: Int64[np.ndarray, "entering inputs"],
    ) -> None:  # fmt: skip
        mine = [array[:, :, side] for array in (self.outward, self.input, self.position)]  # views
        number = np.broadcast_to(self.inputs + np.arange(outward.shape[-1]), outward.shape)
        both = [np.concatenate([old[columns], new], -1) for old, new in zip(mine, (outward, number, position), strict=True)]
        best = np.argsort(-both[0], axis=-1, kind="stable")[:, : self.outward.shape[-1]]
        for old, joined in zip(mine, both, strict=True):
            old[columns] = np.take_along_axis(joined, best, -1)


_ARRAYS = ("inputs_with_role", "outward", "input", "position", "histogram")


def collect(
    model: PreTrainedModel, bank: Bank, conversations: Sequence[TokenizedConversation], *, top: int = 32, state: Path | None = None,
    batch_tokens: int = 4096, progress: bool = False,
) -> TopTokens:  # fmt: skip
    """The top tokens of all conversations, in one forward of each as far as the last watched block.

    `state` keeps what is done after every chunk: a run that was killed goes on, and gives the same bits as one that was not.
    Raises: `UserError` if `state` holds more inputs than there are, or another `top`.
    """
    tokens = TopTokens(bank.directions, sum(bank.counts), top=top)
    if state is not None and state.exists():
        tokens = TopTokens.load(state, directions=bank.directions)
        if tokens.inputs > len(conversations) or tokens.outward.shape[-1] != top:
            raise UserError(f"{state} holds an audit of other conversations or options: remove it, or choose another --out")
    for _, peaks in scan(model, bank, conversations, batch_tokens=batch_tokens, start=tokens.inputs, progress=progress):
        tokens.add(peaks)
        if state is not None:
            tokens.save(state)
    return tokens
