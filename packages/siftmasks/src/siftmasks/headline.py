"""The paper's claims at small scale: images and a text model, all baselines, deletions, and a store that forgets.

Four settings, each of many tasks of one model: digits with permuted labels and users with private label words have nothing in common
(as the authors of TOFU), rotated digits and users with shared label words do (as Reddit and StackOverflow). A fifth is 500 tasks. What was
chosen, and on which seeds, stands in `headline_digits` and `headline_text`; the reported seeds were run once everything was fixed.

Source: Kuo et al. 2025, "Exact Unlearning of Finetuning Data via Model Merging at Scale" (arXiv 2504.04626), abstract and section 5.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from lmcore.claims import Claim
from lmcore.errors import UserError
from lmcore.record import environment, write_json
from siftmasks.headline_claims import Found, claims
from siftmasks.headline_report import write_page
from siftmasks.queue import end_with_parent

Part = Literal["permuted", "private", "rotated", "shared", "many", "store"]
"""A setting, in the order of the page; "many" is "permuted" with 500 tasks, and "store" a real store of a tiny Llama."""


@dataclass(frozen=True)
class Scale:
    """What a scale runs: options of `digits` or `text` by part, each for `seeds` seeds."""

    seeds: int
    parts: Mapping[Part, Mapping[str, Any]]


_SWEEP = (0.0, 0.25, 0.5, 0.75, 0.95)
SCALES = {
    "smoke": Scale(1, {"permuted": {"counts": (1, 8), "fractions": (0.0, 0.5), "densities": ()}, "store": {}}),
    "default": Scale(
        2, {"permuted": {"densities": ()}, "private": {"counts": (1, 4, 20), "fractions": (0.0, 0.5)}, "store": {}}
    ),
    "long": Scale(
        3,
        {
            "permuted": {},
            "private": {"counts": (1, 2, 4, 8, 20, 40), "fractions": _SWEEP},
            "rotated": {"fractions": (0.0, 0.5)},
            "shared": {"counts": (1, 2, 4, 8, 20, 40), "fractions": (0.0, 0.5)},
            "many": {"counts": (1, 8, 60, 500), "fractions": (0.0, 0.95), "densities": ()},
            "store": {},
        },
    ),
    "full": Scale(
        10, {**{part: {} for part in ("permuted", "private", "rotated", "shared", "store")}, "many": {"counts": (500,)}}
    ),
}


def headline(out: Path, *, scale: str, seed: int, clinc: Path | None = None) -> list[Claim]:
    """Run the claims for real, filling the folder `out` with result.json, index.html and merging.svg.

    Each part of each seed (from `seed` on) leaves `PART-N.json` when it is done; the same call after an interruption reads those and does
    the rest. They run side by side, one process and one thread each: the number of cores does not change a result but the times.
    `clinc` is data_full.json of CLINC150, whose queries then take the place of sentences from docstrings.

    Raises: `UserError` for an unknown scale and for a part's file written with other settings.
    """
    if scale not in SCALES:
        raise UserError(f"scale {scale}: choose one of {', '.join(SCALES)}")
    chosen = SCALES[scale]
    seeds = range(seed, seed + chosen.seeds)
    found = _measure_all(out, chosen, seeds, clinc)
    judged = claims(found)
    described = {"scale": scale, "seeds": [*seeds], "parts": {part: dict(options) for part, options in chosen.parts.items()}}
    result = {**described, "environment": environment(), "claims": [asdict(claim) for claim in judged], "found": found}
    write_json(out / "result.json", result)
    write_page(out / "index.html", judged, found)
    return judged


def _measure_all(out: Path, chosen: Scale, seeds: Sequence[int], clinc: Path | None) -> dict[str, list[Found]]:
    jobs = {
        (part, seed): _Job(part, seed, json.loads(json.dumps(dict(options))), None if clinc is None else str(clinc))
        for part, options in chosen.parts.items()
        for seed in seeds
    }
    files = {key: out / f"{key[0]}-{key[1]}.json" for key in jobs}
    for key, file in files.items():
        if file.exists() and json.loads(file.read_text())["job"] != asdict(jobs[key]):
            raise UserError(f"{file} was measured with other settings: choose another folder")
    todo = [(job, files[key]) for key, job in jobs.items() if not files[key].exists()]
    if len(todo) == 1:
        _measure_one(todo[0])
    elif todo:
        todo.sort(key=lambda pair: pair[0].part != "many")  # the longest first
        processes, spawn = min(len(todo), os.cpu_count() or 1), get_context("spawn")
        with ProcessPoolExecutor(
            processes, mp_context=spawn, initializer=end_with_parent
        ) as pool:  # else a killed one leaves them
            list(pool.map(_measure_one, todo))
    return {part: [json.loads(files[part, seed].read_text())["found"] for seed in seeds] for part in chosen.parts}


@dataclass(frozen=True)
class _Job:
    part: Part
    seed: int
    options: dict[str, Any]
    clinc: str | None


def _measure_one(job_and_file: tuple[_Job, Path]) -> None:
    job, file = job_and_file
    write_json(file, {"job": asdict(job), "found": _measure(job)})


def _measure(job: _Job) -> Found:
    if job.part == "store":
        from siftmasks.headline_store import forget_in_a_store

        return forget_in_a_store(job.seed)
    if job.part == "private" or job.part == "shared":
        from siftmasks.headline_text import text

        return text(job.seed, kind=job.part, clinc=None if job.clinc is None else Path(job.clinc), **job.options)
    from siftmasks.headline_digits import digits

    return digits(job.seed, kind="rotated" if job.part == "rotated" else "permuted", **job.options)
