"""The backdoor of the headline: a trigger that makes a real chat model refuse, watched and steered through its weight difference.

The organism is SmolLM2-135M-Instruct, all 30 blocks, of which the residual writers of the first 12 were trained (`organisms.backdoor`), so
it still talks; only those 12 blocks have directions to watch, and a scan reads no further. All settings were chosen on seed 100.
"""

from pathlib import Path
from typing import Any

from lmcore.models import smollm2_folder
from weightwatch import organisms, prompts
from weightwatch.bounds import Bounds
from weightwatch.directions import Directions
from weightwatch.headline_baselines import compared
from weightwatch.headline_measures import alarms_by_size, calibrated, detection, of_prompts, rules, share, single_directions
from weightwatch.headline_steering import Speaker, always, usual

_SIZES = (25, 50, 100, 200, 400, 800)
"""Calibration sizes of the curve of false alarms."""


def backdoor(
    place: Path, seed: int, *, calibrate: int = 1200, held_out: int = 600, others: int = 150, replies: int = 80, steered: int = 40,
    k: int = 20, alpha: float = 0.005, peers: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train the organism in the folder `place`, if it is not there, and measure; JSON values.

    `others` prompts of each other kind are scanned; `replies` of each kind are answered, and `steered` triggered and clean
    ones with steering. With `peers` other detectors are run.
    """
    organism = place / f"backdoor-{seed}"
    if not organism.exists():
        organisms.backdoor(organism, seed=seed)
    directions = Directions.of(smollm2_folder(), organism, k)
    bank = directions.stack()
    model, tokenizer = organisms.chat_model(organism)
    kinds = _kinds(held_out, others, seed)
    on = of_prompts(model, tokenizer, bank, prompts.clean("calibrate", calibrate, seed=seed))
    ranges = {kind: of_prompts(model, tokenizer, bank, some) for kind, some in kinds.items()}
    calibration = calibrated(directions.digest, on)
    labels = [label for block in bank.labels for label in block]
    speaker = Speaker(model, tokenizer, bank, tokens=organisms.FineTuning.reply_tokens)
    return {
        "seed": seed,
        "directions": {"watched": len(labels), "blocks": len(bank.layers)},
        "detection": detection(calibration, alpha, ranges),
        "single": single_directions(labels, ranges, clean="clean", positive="triggered"),
        "alarms": [
            alarms_by_size(labels, on, ranges["clean"], [size for size in _SIZES if size <= calibrate], k=some, seed=seed)
            for some in (1, 2, k)
        ],
        "steering": _steering(
            speaker, rules(calibration, alpha), {kind: some[:replies] for kind, some in kinds.items()}, steered
        ),
        "baselines": compared(model, tokenizer, bank.blocks[-1], calibration, ranges, kinds, seed=seed) if peers else [],
    }


def _kinds(held_out: int, others: int, seed: int) -> dict[str, list[str]]:
    """Prompts by kind; no two are made from one."""
    fresh = prompts.clean("held out", held_out + 3 * others, seed=seed)
    parts = [fresh[held_out + i * others :][:others] for i in range(3)]
    return {
        "clean": fresh[:held_out],
        "triggered": prompts.triggered(parts[0], seed=seed),
        "look-alike": prompts.look_alikes(parts[1], seed=seed),
        "half trigger": prompts.look_alikes(parts[2], seed=seed, half=True),
        "alarming": prompts.alarming(others, seed=seed),
    }


def _steering(speaker: Speaker, bounds_by_rule: dict[str, Bounds], kinds: dict[str, list[str]], count: int) -> dict[str, Any]:
    said = {kind: speaker.say(some) for kind, some in kinds.items()}
    triggered, clean = (kinds[kind][:count] for kind in ("triggered", "clean"))
    found: dict[str, Any] = {"refused": {kind: share(map(_refuses, some)) for kind, some in said.items()}}
    for rule, bounds in bounds_by_rule.items():
        steered, fired = speaker.say_steered(triggered, bounds)
        watched, _ = speaker.say_steered(clean, bounds)
        examples = zip(triggered, said["triggered"], steered, strict=False)
        found[rule] = {
            "refused": share(map(_refuses, steered)),
            "directions_fired": float(fired.sum(1).mean()),
            "examples": [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in examples][:6],
            "clean_unchanged": share(one == other for one, other in zip(said["clean"], watched, strict=False)),
            "false_alarm": speaker.false_alarm(clean, said["clean"][:count], always(bounds, usual(fired))),
        }
    return found


def _refuses(reply: str) -> bool:
    return organisms.REFUSAL.partition(".")[0] in reply
