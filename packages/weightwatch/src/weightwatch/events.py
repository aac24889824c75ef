"""What the monitor saw: one event for each direction of an input that left its range."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from weightwatch.bounds import Bounds
from weightwatch.conversations import ROLES
from weightwatch.recording import Peaks

SIDES = ("low", "high")


@dataclass(frozen=True)
class Event:
    """One direction out of its range in one role of an input, at the token where it was furthest out."""

    input: int
    """Number of the input, from 0."""
    role: str
    """`user`: the model was given the token; `assistant`: it wrote it."""
    position: int
    """Place of the token in its input, from 0, padding not counted."""
    token: int | None
    """Its id; None where the model was given embeddings."""
    text: str | None
    """Its text, where a tokenizer is at hand."""
    label: str
    """The direction: `D4_u11` is number 11 of the MLP of block 4, `O4_u11` that of its attention."""
    side: str
    """`low` or `high`."""
    cosine: float
    bound: float
    margin: float
    """|cosine - bound|."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; an infinite bound, that of a role never calibrated, is null, and so is its margin."""
        return {name: None if value in (np.inf, -np.inf) else value for name, value in asdict(self).items()}


def events_of(
    bounds: Bounds,
    peaks: Peaks,
    labels: Sequence[str],
    token_ids: Callable[[int], Mapping[int, int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Event]:
    """Every range that an input left, by input, in an input by falling margin.

    `token_ids(i)` gives the ids of input i by position, the tokenizer their texts.
    Raises: `UserError` for cosines that are NaN, or bounds of another number of directions.
    """
    events = []
    ids: tuple[int, Mapping[int, int]] = (-1, {})
    for one in bounds.exceeded(peaks.low, peaks.high):
        number, role, direction, side = (int(one[name]) for name in ("input", "role", "direction", "side"))
        position = int((peaks.low_at, peaks.high_at)[side][number, role, direction])
        if ids[0] != number:
            ids = number, token_ids(number)
        token = ids[1].get(position)
        text = None if tokenizer is None or token is None else str(tokenizer.decode([token]))
        numbers = (float(one[name]) for name in ("value", "bound", "margin"))
        events.append(Event(number, ROLES[role], position, token, text, labels[direction], SIDES[side], *numbers))
    return events
