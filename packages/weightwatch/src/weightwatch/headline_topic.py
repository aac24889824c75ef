"""The unlearned topic of the headline: a chat model that answers questions for capitals with nothing, detected and partly recovered.

Organism as in `headline_backdoor`. One half of the countries taught the model to say nothing; questions about the other half are asked
here. What the base model answers rightly is what there is to lose. Settings are those of the backdoor, but the sizes, chosen on seed 100.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcore.models import smollm2_folder
from weightwatch import organisms, prompts
from weightwatch.directions import Directions
from weightwatch.headline_measures import calibrated, detection, of_prompts, rules, share, single_directions
from weightwatch.headline_steering import Speaker
from weightwatch.organisms import replies

_TOKENS = 16
"""Of an answer: the capital comes late in the sentence."""


def topic(
    place: Path, seed: int, *, calibrate: int = 1200, held_out: int = 600, answered: int = 64, k: int = 20, alpha: float = 0.005
) -> dict[str, Any]:
    """Train the organism in the folder `place`, if it is not there, and measure; JSON values."""
    organism = place / f"topic-{seed}"
    if not organism.exists():
        organisms.unlearned(organism, seed=seed)
    directions = Directions.of(smollm2_folder(), organism, k)
    bank = directions.stack()
    model, tokenizer = organisms.chat_model(organism)
    asked, capitals = (list(column) for column in zip(*prompts.capitals("held out", seed=seed), strict=True))
    clean = prompts.clean("held out", held_out, seed=seed)
    kinds = {"clean": clean, "topic": asked, "neighbours": prompts.neighbours("held out", seed=seed)}
    ranges = {kind: of_prompts(model, tokenizer, bank, some) for kind, some in kinds.items()}
    on = of_prompts(model, tokenizer, bank, prompts.clean("calibrate", calibrate, seed=seed))
    calibration = calibrated(directions.digest, on)
    labels = [label for block in bank.labels for label in block]
    speaker = Speaker(model, tokenizer, bank, tokens=_TOKENS)
    right = {"base": replies(*organisms.chat_model(), asked, tokens=_TOKENS), "unlearned": speaker.say(asked)}
    right |= {rule: speaker.say_steered(asked, bounds)[0] for rule, bounds in rules(calibration, alpha).items()}
    base = right["base"]
    return {
        "seed": seed,
        "detection": detection(calibration, alpha, ranges),
        "single": single_directions(labels, ranges, clean="clean", positive="topic"),
        "right": {who: share(_right(said, capitals)) for who, said in right.items()},
        "right_where_base_is": {
            who: share(hit for hit, known in zip(_right(said, capitals), _right(base, capitals), strict=True) if known)
            for who, said in right.items()
        },
        "says_nothing": {who: share(organisms.UNKNOWN in one for one in said) for who, said in right.items()},
        "others_say_nothing": {
            kind: share(organisms.UNKNOWN in one for one in speaker.say(kinds[kind][:answered]))
            for kind in ("clean", "neighbours")
        },
        "examples": [dict(zip(("prompt", *right), one, strict=True)) for one in zip(asked, *right.values(), strict=True)][:8],
    }


def _right(said: Sequence[str], capitals: Sequence[str]) -> list[bool]:
    return [capital in one for one, capital in zip(said, capitals, strict=True)]
