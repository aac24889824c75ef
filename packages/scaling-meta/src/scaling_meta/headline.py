"""The paper's claims on the shipped database: what design adds to scale, as published and honestly, and which choices matter.

Nothing is downloaded and nothing is trained but trees; all numbers follow from the database and the seeds.

Source: Liu et al., "Not-Just Scaling Laws: Towards a Better Understanding of the Downstream Impact of Language Model Design Decisions"
(arXiv 2503.03862).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lmcore.claims import Claim
from lmcore.errors import UserError
from lmcore.record import Run, write_json
from scaling_meta.database import Database
from scaling_meta.headline_claims import claims
from scaling_meta.headline_measures import answers_of, gains_of
from scaling_meta.headline_report import write_page
from scaling_meta.schema import BENCHMARKS
from scaling_meta.tasks import read_task

_LANGUAGE_AND_CODE = ("hellaswag", "lambada", "humaneval")


@dataclass(frozen=True)
class Scale:
    """What a scale runs on each of `tasks`: the gain of all design features, and the answers from `draws` draws of families.

    Gains are on random folds for `seeds` seeds, unseen families and the most compute. With `select` also those of selected features, as
    published and chosen anew in each training set.
    """

    tasks: tuple[str, ...]
    seeds: int
    draws: int
    select: bool = False


SCALES = {
    "smoke": Scale(_LANGUAGE_AND_CODE, seeds=2, draws=50),
    "default": Scale(tuple(BENCHMARKS), seeds=10, draws=200),
    "long": Scale(tuple(BENCHMARKS), seeds=10, draws=1000, select=True),
    "full": Scale(tuple(BENCHMARKS), seeds=50, draws=5000, select=True),
}


def headline(out: Path, *, scale: str, seed: int) -> list[Claim]:
    """Run the claims, filling the folder `out` with result.json, index.html, gains.svg and effects.svg.

    Each part of each task leaves a file when it is done; the same call after an interruption uses them and does the rest.

    Raises: `UserError` for an unknown scale, or a folder with another scale or seed.
    """
    if scale not in SCALES:
        raise UserError(f"scale {scale}: choose one of {', '.join(SCALES)}")
    chosen = SCALES[scale]
    run = Run(out, {"scale": scale, "seed": seed})  # as the command has it
    database, seeds = Database.shipped(), [*range(seed, seed + chosen.seeds)]
    found: dict[str, Any] = {"gains": {}, "answers": {}}
    for name in chosen.tasks:
        task = read_task(database, name)
        found["gains"][name] = _once(out / f"gains-{name}.json", partial(gains_of, task, seeds))
        found["answers"][name] = _once(out / f"answers-{name}.json", partial(answers_of, task, chosen.draws, seed))
    if chosen.select:
        from scaling_meta.select_command import Select

        found["selected"] = Select(out=out / "select", as_published=True, halves=0, seed=seed).run()["tasks"]
    judged = claims(found, seeds)
    write_page(out, judged, found)
    run.finish({"scale": scale, "seeds": seeds, "claims": [asdict(claim) for claim in judged], "found": found})
    return judged


def _once(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, which is made if it is not there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_bytes())
