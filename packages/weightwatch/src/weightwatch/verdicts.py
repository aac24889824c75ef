"""What a calibrated monitor says of inputs, as JSON."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmcore.errors import UserError
from weightwatch.bounds import Bounds, Scores
from weightwatch.calibration import Calibration
from weightwatch.conversations import ROLES
from weightwatch.drift import Drift
from weightwatch.events import events_of
from weightwatch.recording import Peaks


def verdicts(
    ids: Sequence[str], peaks: Peaks, bounds: Bounds, scores: Scores | None, labels: Sequence[str],
    token_ids: Callable[[int], Mapping[int, int]], tokenizer: PreTrainedTokenizerBase, *, most: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Per input: `id`, `flagged`, `score`, `p_value` and the `most` events that lie furthest out, with the number of all as `exceeded`.

    Score and p-value are None without `scores`, and where an input has no watched token.
    """
    flags = bounds.flags(peaks.low, peaks.high).tolist()
    events: list[list[dict[str, Any]]] = [[] for _ in ids]
    for event in events_of(bounds, peaks, labels, token_ids, tokenizer):
        one = event.to_json()
        events[one.pop("input")].append(one)
    numbers: list[tuple[float | None, float | None]] = [(None, None)] * len(ids)
    if scores is not None:
        found = scores.of(peaks.low, peaks.high)
        pairs = zip(found.tolist(), scores.p_values(found).tolist(), strict=True)
        numbers = [(score, p) if np.isfinite(score) else (None, p if score > 0 else None) for score, p in pairs]
    return [
        {"id": name, "flagged": flag, "score": score, "p_value": p, "exceeded": len(some), "events": some[:most]}
        for name, flag, (score, p), some in zip(ids, flags, numbers, events, strict=True)
    ]


def warn_of_unseen(bounds: Bounds, roles: Iterable[int]) -> None:
    """Warn of roles among `roles`, numbers, that calibration never saw: every input with such a token is flagged."""
    for role in sorted({*roles}):
        if (bounds.low[role] > bounds.high[role]).any():
            warnings.warn(
                f"no input of the calibration has tokens of the {ROLES[role]}, so all that have are flagged: "
                "calibrate on conversations with both prompt and completion",
                stacklevel=2,
            )


def scores_of(calibration: Calibration) -> Scores | None:
    """The scores of a calibration, None where it is too small to have any."""
    try:
        return calibration.scores()
    except UserError:
        return None


def drift_of(scores: Scores | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Drift alarms over the scores of verdicts, in their order: `alarms`, the `blocks` that were compared, or `why` none was."""
    try:
        drift = Drift(np.zeros(0) if scores is None else scores.sample)
    except UserError as error:
        return {"alarms": [], "blocks": 0, "why": str(error)}
    alarms = drift.add(np.array([row["score"] for row in rows if row["score"] is not None], np.float64))
    why = None if drift.blocks else f"fewer than {drift.block} inputs"
    return {"alarms": [vars(alarm) for alarm in alarms], "blocks": drift.blocks, "why": why}
