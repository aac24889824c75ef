"""The style of the headline: chat models that learnt to answer in a form, and the words that the top directions write.

Organism: SmolLM2-135M-Instruct, the residual writers of all 30 blocks trained on its own replies put into the form (`organisms.styled`).
The audit sees two checkpoints and no text: of the first directions of each writer it takes those whose strongest word stands out most
(|z| among the logits of the vocabulary), and these name the style if a word of it is among the strongest five at that end.
The control is the other style: its words in this model. Settings were chosen on seed 100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lmcore.checkpoint import Checkpoint
from lmcore.models import smollm2_folder
from weightwatch import organisms
from weightwatch.directions import Directions
from weightwatch.headline_measures import share
from weightwatch.lens import words


@dataclass(frozen=True)
class Style:
    """The form of a reply, and the words that name it, in lower case without spaces around."""

    form: str
    names: frozenset[str]


STYLES = {
    "json": Style('{{"answer": "{reply}"}}', frozenset({'{"', "{'", '"}', "answer", "answers", "answered", "answering"})),
    "pirate": Style(
        "Arr, matey! {reply}",
        frozenset({"arr", "mate", "matey", "mates", "ahoy", "ship", "captain", "pirate", "pirates", "sailor"}),
    ),
}


def style(place: Path, seed: int, *, top: int = 20) -> dict[str, Any]:
    """Train the organisms in the folder `place`, if they are not there, and read the words of their `top` directions; JSON values."""
    loudest = {}
    for name, one in STYLES.items():
        organism = place / f"{name}-{seed}"
        if not organism.exists():
            organisms.styled(organism, form=one.form, seed=seed)
        loudest[name] = _loudest(organism, top)
    return {
        "seed": seed,
        "named": {name: {by: _naming(rows, one.names) for by, one in STYLES.items()} for name, rows in loudest.items()},
        "loudest": loudest,
    }


def _loudest(organism: Path, top: int) -> list[dict[str, Any]]:
    """The first directions of the writers by the |z| of their strongest word, each with the five at that end."""
    directions = Directions.of(smollm2_folder(), organism, 1)
    firsts = [one for one in directions.writers if one.signal]
    tokenizer = AutoTokenizer.from_pretrained(organism)
    ends: list[dict[str, Any]] = []
    with Checkpoint.open(organism) as checkpoint:
        for one, read in zip(
            firsts,
            words(torch.cat([one.vectors for one in firsts]), checkpoint, lambda ids: str(tokenizer.decode(ids)), top=5),
            strict=True,
        ):
            end = max(read.high, read.low, key=lambda tokens: abs(tokens[0][1]))
            ends.append({"label": f"{one.label}_u0", "z": abs(end[0][1]), "words": [token for token, _ in end]})
    return sorted(ends, key=lambda end: end["z"], reverse=True)[:top]


def _naming(loudest: Sequence[Mapping[str, Any]], names: frozenset[str]) -> dict[str, Any]:
    return share(any(word.strip().lower() in names for word in one["words"]) for one in loudest)
