"""The paper's claims in the arithmetic world, where Pass@k is exact, and a merge of two real checkpoints.

A tiny Llama learns to add by supervised fine-tuning (SFT) on few chains (`wiseft.arithmetic`). WiSE-FT is `1/2 early + 1/2 last`, with the
checkpoint one fifteenth of the way through SFT as EARLY. Both were fixed beforehand and nothing of WiSE-FT is chosen on the test
problems; its baselines are: early stopping takes the best epoch on them and the temperature baseline the best temperature, for each k
anew, which flatters both. The settings of the world were chosen on the seeds 100 to 102, such that the base model is a diverse but sloppy
reasoner and SFT lets diversity collapse; they were not touched once the reported seeds had run.

Source: Dang et al. 2025, "Weight Ensembling Improves Reasoning in Language Models" (arXiv 2504.10478), abstract.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lmcore.claims import Claim, Quantity, judge, not_tested
from lmcore.errors import UserError
from lmcore.record import environment, write_json
from wiseft.arithmetic import World
from wiseft.headline_report import write_page
from wiseft.headline_seed import KS, Settings, measure

K = 64
"""The k of the claims about Pass@k."""


@dataclass(frozen=True)
class Scale:
    """What a scale runs."""

    seeds: int
    settings: Settings
    real: bool
    """Merge two SmolLM2-135M checkpoints."""


_SMOKE = World(
    addends=2,
    hidden_size=48,
    intermediate_size=128,
    pretrain_steps=400,
    pretrain_rate=3e-3,
    chains=20,
    epochs=30,
    batch=8,
    test_problems=100,
)
SCALES = {
    "smoke": Scale(1, Settings(world=_SMOKE, early=2, every=2, samples=16, rl_steps=20), real=False),
    "default": Scale(2, Settings(samples=32, rl_steps=0), real=True),
    "long": Scale(5, Settings(), real=True),
    "full": Scale(10, Settings(world=World(hidden_size=192, intermediate_size=512, layers=4, test_problems=2000)), real=True),
}


def headline(out: Path, *, scale: str, seed: int) -> list[Claim]:
    """Run the claims for real, filling the folder `out` with result.json and index.html.

    Each seed (from `seed` on) leaves `seed-N.json` when it is done; the same call after an interruption reads those and does the
    rest. Seeds run side by side, one process and one thread each: the number of cores does not change a result.

    Raises: `UserError` for an unknown scale, a seed out of range, and a seed's file written with other settings.
    """
    if scale not in SCALES:
        raise UserError(f"scale {scale}: choose one of {', '.join(SCALES)}")
    chosen = SCALES[scale]
    if not 0 <= seed <= 2**32 - chosen.seeds:  # what NumPy takes
        raise UserError(f"seed is {seed}: it must be in [0, 2^32 - {chosen.seeds}]")
    seeds = tuple(range(seed, seed + chosen.seeds))
    worlds = _measure_all(out, chosen.settings, seeds)
    found = claims(worlds, chosen.settings)
    real, merge_claim = None, not_tested(id=_MERGE, statement=_MERGE_STATEMENT, why=f"left out at scale {scale}")
    if chosen.real:
        real, merge_claim = _merge_real(seed)
    found.append(merge_claim)
    result = {
        "scale": scale,
        "settings": dataclasses.asdict(chosen.settings),
        "ks": list(KS),
        "environment": environment(),
        "claims": [dataclasses.asdict(claim) for claim in found],
        "real_checkpoints": real,
        "seeds": worlds,
    }
    write_json(out / "result.json", result)
    write_page(out / "index.html", found, worlds, chosen.settings, K)
    return found


def claims(worlds: Sequence[dict[str, Any]], settings: Settings) -> list[Claim]:
    """Judge what `headline_seed.measure` found for each seed: all but the merge of real checkpoints."""
    seeds = [world["seed"] for world in worlds]
    voters = settings.voters

    def effect(id: str, statement: str, of: Callable[[dict[str, Any]], float], unit: str = "points") -> Claim:
        return judge(id=id, statement=statement, effects=[of(world) for world in worlds], unit=unit, seeds=seeds)

    def gain(k: int, better: str, worse: str) -> Callable[[dict[str, Any]], float]:
        return lambda world: 100 * (_at(world["models"][better], k) - _at(world["models"][worse], k))

    def gain_over_best(k: int, rivals: str) -> Callable[[dict[str, Any]], float]:
        return lambda world: 100 * (_at(world["models"]["wise"], k) - max(_at(rival, k) for rival in world[rivals]))

    def vote_gain(kind: str) -> Callable[[dict[str, Any]], float]:
        return lambda world: 100 * (world["votes"]["wise"][kind] - world["votes"]["last"][kind])

    found = [
        effect("sft-pass-at-1-rises", f"From epoch {settings.early} to the last of SFT Pass@1 rises", gain(1, "last", "early")),
        effect(
            f"sft-pass-at-{K}-falls", f"From epoch {settings.early} to the last of SFT Pass@{K} falls", gain(K, "early", "last")
        ),
        effect(f"wise-pass-at-{K}", f"WiSE-FT recovers Pass@{K} over the last checkpoint", gain(K, "wise", "last")),
        effect("wise-pass-at-1", "WiSE-FT also improves Pass@1 over the last checkpoint", gain(1, "wise", "last")),
        effect(
            f"wise-early-stopping-pass-at-{K}",
            f"WiSE-FT beats early stopping at Pass@{K} (the single epoch that is best on the test problems)",
            gain_over_best(K, "epochs"),
        ),
        effect(
            f"majority-at-{voters}",
            f"WiSE-FT has a better majority vote@{voters} of final answers than the last checkpoint",
            vote_gain("majority"),
        ),
        effect(
            f"best-at-{voters}",
            f"WiSE-FT has a better Best@{voters} than the last checkpoint (reward: the sample's likelihood under the base model)",
            vote_gain("best"),
        ),
        effect(
            "decoding-complementary",
            f"WiSE-FT is complementary to decoding: it gains at Pass@{K} over the last checkpoint under the same temperature, top-k, "
            f"top-p and min-p, at each of {len(worlds[0]['decoding'])} settings (the effect is the least gain)",
            lambda world: 100 * min(_at(row["wise"], K) - _at(row["last"], K) for row in world["decoding"]),
        ),
        effect(
            "beats-best-temperature",
            f"WiSE-FT at temperature 1 beats the last checkpoint at its best temperature (on the test problems) at Pass@{K}",
            gain_over_best(K, "temperatures"),
        ),
        effect(
            "variance-at-equal-bias",
            "WiSE-FT has less variance of Pass@1 than the last checkpoint at the temperature that gives it the same bias",
            lambda world: 100 * (1 - world["models"]["wise"]["variance"] / world["equal_bias"]["variance"]),
            "% less variance",
        ),
    ]
    higher = ("rl-final-pass-at-1", "RL from WiSE-FT ends at a higher Pass@1 than RL from the last checkpoint")
    sooner = (
        "rl-less-data",
        "RL from WiSE-FT reaches the final Pass@1 of RL from the last checkpoint with fewer problems (if never: -100 %)",
    )
    if not settings.rl_steps:
        why = "this scale has no time for reinforcement learning: see the scale long"
        return [*found, *(not_tested(id=id, statement=statement, why=why) for id, statement in (higher, sooner))]
    return [
        *found,
        effect(*higher, lambda world: 100 * (_at(world["rl"]["wise"][-1], 1) - _at(world["rl"]["last"][-1], 1))),
        effect(*sooner, lambda world: 100 * _data_saved(world["rl"]["wise"], world["rl"]["last"]), "% fewer problems"),
    ]


def _data_saved(curve: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Share of the reference's problems that `curve` did not need to reach the reference's final Pass@1; -1 if it never did."""
    goal = _at(reference[-1], 1)
    needed = [record["problems"] for record in curve if _at(record, 1) >= goal]
    return 1 - needed[0] / reference[-1]["problems"] if needed else -1.0


def _at(record: dict[str, Any], k: int) -> float:
    return float(record["pass_at_k"][KS.index(k)])


def _measure_all(out: Path, settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    described = json.loads(json.dumps(dataclasses.asdict(settings)))
    files = {seed: out / f"seed-{seed}.json" for seed in seeds}
    for file in files.values():
        if file.exists() and _settings(file) != described:
            raise UserError(f"{file} was measured with other settings: choose another folder, or delete it")
    todo = [(settings, seed, file) for seed, file in files.items() if not file.exists()]
    if len(todo) == 1:
        _measure_one(todo[0])
    elif todo:
        workers = min(len(todo), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_measure_one, todo))
    return [json.loads(file.read_text()) for file in files.values()]


def _settings(file: Path) -> Any:
    try:
        return json.loads(file.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        return None


def _measure_one(job: tuple[Settings, int, Path]) -> None:
    settings, seed, file = job
    found = measure(settings, seed, file.with_suffix(""))
    write_json(file, {"seed": seed, "settings": dataclasses.asdict(settings), **found})


_MERGE = "merge-real-checkpoints"
_MERGE_STATEMENT = (
    "Merging SmolLM2-135M with a short fine-tune of it gives every weight the bfloat16 nearest to the formula, and transformers "
    "loads the result and writes text"
)


def _merge_real(seed: int) -> tuple[dict[str, Any] | None, Claim]:
    from wiseft.real_checkpoints import merge_smollm2

    try:
        found = merge_smollm2(delta=0.3, steps=2, seed=seed)
    except UserError as error:
        return None, not_tested(id=_MERGE, statement=_MERGE_STATEMENT, why=str(error))
    holds = found["misrounded"] == 0 and found["changed"] > 0 and bool(found["completion"])
    claim = Claim(
        id=_MERGE,
        statement=_MERGE_STATEMENT,
        measured=Quantity(found["misrounded"], f"of {found['weights']:,} weights not the nearest"),
        interval=None,
        seeds=(seed,),
        verdict="reproduced" if holds else "not reproduced",
        rule="reproduced if no weight is off, the fine-tune changed some, and the merged model writes text",
    )
    return found, claim
