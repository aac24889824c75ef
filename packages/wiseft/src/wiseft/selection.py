"""Choose the early checkpoint, delta and temperature with the best Pass@k, sampling no more than it takes: `wiseft select`."""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.record import write_json
from wiseft.barrier import measure_barriers
from wiseft.comparison import compare
from wiseft.counting import Candidate, Count, Ledger, LiveModel, Sampling, candidates_of, labelled
from wiseft.decoding import Decoding
from wiseft.generation import Chat, identity, requests_for, require_room
from wiseft.passk import pass_at_k
from wiseft.plan import plan
from wiseft.problems import Problem
from wiseft.racing import Race, mean_interval
from wiseft.resumable import continued
from wiseft.selection_report import write_report
from wiseft.summary import summarize
from wiseft.verifiers import Verdict, gsm8k, require_readable

_BARRIER_PROBLEMS = 64
_RESULTS = ("barriers.json", "result.json", "index.html")

Json = dict[str, Any]
Counter = Callable[[Candidate, Problem], Count]


def select(
    late: str | Path,
    early: Sequence[str | Path],
    problems: Sequence[Problem],
    *,
    k: int,
    out: Path,
    delta: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
    temperature: Sequence[float] = (0.7, 1.0, 1.3),
    n: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    verifier: Callable[[str, str], Verdict] = gsm8k,
    block: int = 8,
    tolerance: float = 0.0,
    holdout: float = 0.25,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 512,
    template: str = "{prompt}",
    chat: Chat = "auto",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Json:
    """Race all candidates for the best Pass@k, and measure the winner again on problems held out.

    Candidates are each of `early` at each `delta` (its weight) and `temperature`, and LATE alone at each temperature. A random share
    `holdout` of the problems is set aside. The others come in random order, `block` of them a round: every candidate still running
    draws n samples of each, with the random numbers that the others have too, and those shown not to be the best leave. The race ends
    with one left, with the leader at most `tolerance` worse than any other running (0: never so), or with the last problem;
    `racing.Race` says what is guaranteed. Of those left, the one with the highest Pass@k is chosen. n is k by default, which makes the
    most of a sample while problems last; where they are few, a larger n tells more candidates apart.

    The Pass@k of the chosen one in the race is the highest of many, and so too high on average: on the problems held out it is measured
    anew, beside LATE alone at the temperature that did best in the race, with the intervals of `summarize` and `compare`.

    Before the race, the mean loss of the reference answers of up to 64 raced problems is measured along the segment from LATE to each
    EARLY (`barrier`); a barrier above `barrier.NOTABLE` is a warning.

    There is one model in memory, whose weights are set in place. `out` gets `result.json` (what is returned), `index.html`,
    `run.json` (configuration and environment), `barriers.json` and `counts.jsonl`. The last grows by a line per candidate and problem,
    and the same call, with as many threads, continues a run that was killed, to the same result. A run with another configuration is
    refused, or, with `overwrite`, replaced.

    Raises: `UserError` for settings out of range, too few problems, checkpoints that do not fit each other, a reference answer that the
    verifier cannot read, a prompt that leaves no room for `max_new_tokens`, and an `out` that holds another run.
    """
    n = k if n is None else n
    _require_in_range(
        k=k, n=n, block=block, batch_size=batch_size, max_new_tokens=max_new_tokens, holdout=holdout, tolerance=tolerance,
        level=level, seed=seed,
    )  # fmt: skip
    for each in temperature:
        Decoding(temperature=each, top_k=top_k, top_p=top_p, min_p=min_p)
    sources = labelled(early)
    candidates = candidates_of(sources, delta, temperature)
    raced, held_out = _split(problems, holdout, block, seed)
    require_readable(problems, verifier)
    _require_fit(late, sources.values(), delta)

    sampling = Sampling(
        n=n, top_k=top_k, top_p=top_p, min_p=min_p, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template,
        chat=chat, verifier=verifier, seed=seed,
    )  # fmt: skip
    live = LiveModel(late, sources, dtype=dtype, device=device)
    prompts = requests_for([*raced, *held_out], live.tokenizer, n=1, template=template, chat=chat)
    require_room(live.model, prompts, max_new_tokens)
    config = {
        **identity(live.at(None, 0.0), live.tokenizer),
        "early": {label: identity(live.at(label, 1.0), live.tokenizer)["weights"] for label in sources},
        "candidates": [candidate.name for candidate in candidates],
        "problems": _digest([prompt.prompt for prompt in prompts], [asdict(problem) for problem in problems]),
        "k": k,
        "block": block,
        "tolerance": tolerance,
        "holdout": holdout,
        "level": level,
        **sampling.to_json(),
    }
    with (
        continued(out / "counts.jsonl", config, overwrite=overwrite, results=_RESULTS) as file,
        tqdm(desc="select", unit="problem", disable=None) as bar,
    ):
        ledger = Ledger(file)

        def count(candidate: Candidate, problem: Problem) -> Count:
            known = ledger.get(candidate, problem)
            if known is None:
                model = live.at(candidate.early, candidate.delta)
                known = sampling.count(model, live.tokenizer, problem, candidate.temperature)
                ledger.add(candidate, problem, known)
                bar.update()
            return known

        texts = list(zip(prompts, raced[:_BARRIER_PROBLEMS], strict=False))
        barriers = measure_barriers(live, sources, texts, max_new_tokens, out / "barriers.json")
        race = Race(len(candidates), level=level, tolerance=tolerance)
        for start in range(0, len(raced), block):
            if race.decided:
                break
            bar.set_postfix_str(f"{len(race.running)} of {len(candidates)} candidates running")
            these = raced[start : start + block]
            estimates = np.full((len(these), len(candidates)), np.nan)
            for j in race.running:
                estimates[:, j] = pass_at_k(n, [count(candidates[j], problem).correct for problem in these], k)
            race.update(estimates)
        chosen, late_alone = candidates[race.leader], _best_of_late(race, candidates)
        rows = _rows(race, candidates, raced, count, n, level)
        result = {
            "k": k,
            "n": n,
            "level": level,
            "tolerance": tolerance,
            "decision": _decision(race),
            "chosen": chosen.name,
            "candidates": rows,
            "sampling": _spent(rows, len(raced), n),
            "held_out": _held_out(chosen, late_alone, held_out, count, n=n, k=k, level=level, seed=seed),
            "barriers": [asdict(barrier) for barrier in barriers],
        }
        write_report(out / "index.html", result)
        write_json(out / "result.json", result)
    return result


def _rows(
    race: Race, candidates: Sequence[Candidate], raced: Sequence[Problem], count: Counter, n: int, level: float
) -> list[Json]:
    """A row per candidate: the chosen one, the others left, then those eliminated, the last first."""
    rows = []
    for j, candidate in enumerate(candidates):
        values = race.values(j)
        counts = [count(candidate, problem) for problem in raced[: len(values)]]
        status = "chosen" if j == race.leader else "not told apart"
        rows.append(
            {
                "name": candidate.name,
                **asdict(candidate),
                "status": f"eliminated in round {race.eliminated[j]}" if j in race.eliminated else status,
                "problems": len(values),
                "pass_at_k": float(values.mean()),
                "interval": mean_interval(values, level),
                "pass_at_1": sum(one.correct for one in counts) / (n * len(counts)),
                "cut_off": sum(one.cut_off for one in counts) / (n * len(counts)),
                "tokens": sum(one.tokens for one in counts),
            }
        )
    order = {"chosen": 0, "not told apart": 1}
    return sorted(rows, key=lambda row: (order.get(row["status"], 2), -row["problems"], -row["pass_at_k"]))


def _decision(race: Race) -> str:
    if len(race.running) == 1:
        return "one left"
    return "within tolerance" if race.decided else "problems used up"


def _spent(rows: Sequence[Json], raced: int, n: int) -> Json:
    """Samples and tokens of the race; what every candidate on every problem would have cost is known in samples, estimated in tokens."""
    saved = sum(row["tokens"] / row["problems"] * (raced - row["problems"]) for row in rows)
    return {
        "problems": raced,
        "samples": n * sum(row["problems"] for row in rows),
        "samples_without_race": n * raced * len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_saved": round(saved),
    }


def _best_of_late(race: Race, candidates: Sequence[Candidate]) -> Candidate:
    """LATE alone at its best temperature, among those measured on the most problems: they were measured on the same ones."""
    alone = [j for j, candidate in enumerate(candidates) if candidate.early is None]
    return candidates[max(alone, key=lambda j: (len(race.values(j)), race.values(j).mean()))]


def _held_out(
    chosen: Candidate, late: Candidate, problems: Sequence[Problem], count: Counter, *, n: int, k: int, level: float, seed: int
) -> Json | None:
    """Both on problems that had no part in the choice, and their difference."""
    if not problems:
        return None
    settings: Json = {"level": level, "seed": seed}
    found: Json = {"problems": len(problems), "difference": None}
    counts = {}
    for role, candidate in {"chosen": chosen, "late": late}.items():
        counts[role] = ([n] * len(problems), [count(candidate, problem).correct for problem in problems])
        found[role] = {"name": candidate.name, **_at_1_and_k(summarize(*counts[role], [1, k], **settings).pass_at_k)}
    if chosen != late:
        found["difference"] = _at_1_and_k(compare(counts["chosen"], counts["late"], [1, k], **settings).pass_at_k)
    return found


def _at_1_and_k(estimates: Sequence[Any]) -> Json:
    at_1, at_k = ({"value": estimate.value, "interval": estimate.interval} for estimate in estimates)
    return {"pass_at_1": at_1, "pass_at_k": at_k}


def _split(problems: Sequence[Problem], holdout: float, block: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems to race on and those held out, in random order."""
    order = np.random.default_rng(seed).permutation(len(problems))
    raced = len(problems) - round(holdout * len(problems))
    if raced < block:
        raise UserError(
            f"of {len(problems)} problems {raced} are left to race on, fewer than a block of {block}: "
            "use more problems, or a smaller --block or --holdout"
        )
    shuffled = [problems[i] for i in order]
    return shuffled[:raced], shuffled[raced:]


def _require_in_range(
    *,
    k: int,
    n: int,
    block: int,
    batch_size: int,
    max_new_tokens: int,
    holdout: float,
    tolerance: float,
    level: float,
    seed: int,
) -> None:
    for name, value, holds, rule in (
        ("k", k, k >= 1, "at least 1"),
        ("n", n, n >= k, f"at least k = {k}"),
        ("block", block, block >= 1, "at least 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("holdout", holdout, 0 <= holdout < 1, "in [0, 1)"),
        ("tolerance", tolerance, 0 <= tolerance < 1, "in [0, 1)"),
        ("level", level, 0 < level < 1, "between 0 and 1"),
        ("seed", seed, 0 <= seed < 2**64, "in [0, 2^64)"),
    ):
        if not holds:
            raise UserError(f"{name} is {value}: it must be {rule}")


def _require_fit(late: str | Path, early: Iterable[str | Path], delta: Sequence[float]) -> None:
    """What the headers can tell, before anything is loaded."""
    for source in early:
        with Checkpoint.open(source) as a, Checkpoint.open(late) as b:
            found = plan(a, b, delta, missing="late")
            shapes = [{(info.name, info.shape) for info in checkpoint.tensors.values()} for checkpoint in (a, b)]
        for name, shape in sorted(shapes[0] ^ shapes[1]):
            only = source if (name, shape) in shapes[0] else late
            raise UserError(f"only {only} has a tensor {name} of shape {shape}: {source} and {late} must be of one shape")
        for message in found.warnings:
            warnings.warn(message, stacklevel=3)


def _digest(*values: Any) -> str:
    return blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()
