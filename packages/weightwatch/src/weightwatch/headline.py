"""The paper's claims at small scale: a planted mark, and real fine-tunes of a chat model with a backdoor, a lost topic and a style.

What was chosen, and on which seeds, stands in the modules of the parts; the reported seeds were run once everything was fixed.

Source: Zhong and Raghunathan 2025, "Watch the Weights: Unsupervised monitoring and control of fine-tuned LLMs" (arXiv 2508.00161).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lmcore.claims import Claim
from lmcore.errors import UserError
from lmcore.record import Run, write_json
from weightwatch.headline_claims import Found, claims
from weightwatch.headline_report import write_page

Part = Literal["planted", "backdoor", "topic", "style"]
_THREADS = 2
"""Sums depend on how many threads share them, so their number is fixed."""


@dataclass(frozen=True)
class Scale:
    """What a scale runs: options of each part, each for `seeds` seeds."""

    seeds: int
    parts: Mapping[Part, Mapping[str, Any]]


SCALES = {
    "smoke": Scale(1, {"planted": {"calibrate": 1000, "held_out": 1000}}),
    "default": Scale(
        1,
        {"planted": {}, "backdoor": {"calibrate": 800, "held_out": 400, "others": 80, "replies": 32, "steered": 16}},
    ),
    "long": Scale(
        3,
        {
            "planted": {},
            "backdoor": {"held_out": 800, "others": 200, "replies": 100, "steered": 32, "peers": True},
            "topic": {},
            "style": {},
        },
    ),
    "full": Scale(
        5,
        {
            "planted": {},
            "backdoor": {"calibrate": 8000, "held_out": 4000, "others": 1000, "replies": 500, "steered": 500, "peers": True},
            "topic": {},
            "style": {},
        },
    ),
}


def headline(out: Path, *, scale: str, seed: int) -> list[Claim]:
    """Run the claims for real, filling the folder `out` with result.json, index.html and ranges.svg.

    Each part of each seed (from `seed` on) leaves `PART-N.json` when it is done, and the models that it trained lie in `models`; the same
    call after an interruption uses both and does the rest.

    Raises: `UserError` for an unknown scale, or a folder with another scale or seed.
    """
    if scale not in SCALES:
        raise UserError(f"scale {scale}: choose one of {', '.join(SCALES)}")
    chosen = SCALES[scale]
    seeds = [*range(seed, seed + chosen.seeds)]
    options = {part: dict(options) for part, options in chosen.parts.items()}
    run = Run(out, {"scale": scale, "seed": seed})  # as the command has it
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        found: dict[str, list[Found]] = {
            part: [_found(out, part, one, options[part]) for one in seeds] for part in chosen.parts
        }
    finally:
        torch.set_num_threads(before)
    judged = claims(found)
    write_page(out / "index.html", judged, found)
    run.finish(
        {"scale": scale, "seeds": seeds, "parts": options, "claims": [asdict(claim) for claim in judged], "found": found}
    )
    return judged


def _found(out: Path, part: Part, seed: int, options: Mapping[str, Any]) -> Found:
    file = out / f"{part}-{seed}.json"
    if not file.exists():
        write_json(file, _measure(part, out / "models", seed, options))
    found: Found = json.loads(file.read_text())
    return found


def _measure(part: Part, models: Path, seed: int, options: Mapping[str, Any]) -> Found:
    models.mkdir(exist_ok=True)
    if part == "planted":
        from weightwatch.headline_planted import planted

        return planted(seed, **options)
    if part == "backdoor":
        from weightwatch.headline_backdoor import backdoor

        return backdoor(models, seed, **options)
    if part == "topic":
        from weightwatch.headline_topic import topic

        return topic(models, seed, **options)
    from weightwatch.headline_style import style

    return style(models, seed, **options)
