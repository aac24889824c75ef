"""The loss along the segment from LATE to EARLY: a barrier on it says that interpolating the two will not work."""

import inspect
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lmcore.errors import UserError
from lmcore.record import write_json
from wiseft.counting import LiveModel
from wiseft.generation import Request
from wiseft.problems import Problem

DELTAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the loss is measured; 0 is LATE, 1 is EARLY."""

NOTABLE = 0.1
"""Barriers above this many nats per token are worth a warning: an answer of 100 tokens is then e^10 times less likely than the ends
let expect. A convention; lower barriers may hurt too."""


@dataclass(frozen=True)
class Barrier:
    """`height`, in nats per token, is the most by which the loss at `delta` exceeds the line between the losses at the ends."""

    early: str
    height: float
    delta: float
    losses: tuple[float, ...]
    """At each of `DELTAS`."""

    @classmethod
    def of(cls, early: str, losses: Sequence[float]) -> "Barrier":
        """The barrier that the losses at `DELTAS` show; of height 0 at delta 0 if none exceeds the line.

        >>> Barrier.of("checkpoint-100", [1.0, 1.5, 2.5, 2.5, 2.0])
        Barrier(early='checkpoint-100', height=1.0, delta=0.5, losses=(1.0, 1.5, 2.5, 2.5, 2.0))

        Source: Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis (there of the error).
        """
        line = [delta * losses[-1] + (1 - delta) * losses[0] for delta in DELTAS]
        height, delta = max((loss - at, -delta) for loss, at, delta in zip(losses, line, DELTAS, strict=True))
        return cls(early, height, -delta, tuple(losses))

    @property
    def notable(self) -> bool:
        """High enough for a warning."""
        return self.height > NOTABLE


def measure_barriers(
    live: LiveModel, early: Iterable[str], texts: Sequence[tuple[Request, Problem]], max_new_tokens: int, path: Path
) -> list[Barrier]:
    """Measure the barrier between LATE and each EARLY, and warn of the notable ones.

    The loss is that of the reference answers of `texts`, cut off where a completion would be. The losses are kept in `path` (JSON by
    the label of EARLY), where a run that is continued finds them.
    """
    if not path.exists():
        tokens = [
            (prompt.prompt, live.tokenizer(problem.answer, add_special_tokens=False).input_ids[:max_new_tokens])
            for prompt, problem in texts
        ]
        late = answer_loss(live.at(None, 0.0), tokens, "LATE")
        write_json(
            path,
            {
                label: [late, *(answer_loss(live.at(label, d), tokens, f"{label} at delta {d:g}") for d in DELTAS[1:])]
                for label in early
            },
        )
    barriers = [Barrier.of(label, losses) for label, losses in json.loads(path.read_text()).items()]
    for barrier in barriers:
        if barrier.notable:
            warnings.warn(
                f"{barrier.early}: at delta {barrier.delta:g} the loss is {barrier.height:.2f} nats per token above the line between "
                f"LATE and EARLY (more than {NOTABLE}): across such a barrier an interpolation may be worse than both ends",
                stacklevel=3,
            )
    return barriers


def answer_loss(model: PreTrainedModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], where: str) -> float:
    """Mean negative log-likelihood (nats per token) of answers after their prompts, over the tokens of all answers.

    `texts` holds prompts and answers as token ids. They pass one at a time: memory is the longest answer times the vocabulary.
    Raises: `UserError` with `where` if the loss is not finite.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for prompt, answer in texts:
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            last = {"logits_to_keep": len(answer) + 1} if keeps else {}
            logits = model(ids, **last).logits[0, -len(answer) - 1 : -1]
            total += functional.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum").item()
            tokens += len(answer)
    loss = total / tokens
    if not abs(loss) < float("inf"):
        raise UserError(f"{where}: the loss on the reference answers is {loss}; check the weights, or --dtype for overflow")
    return loss
