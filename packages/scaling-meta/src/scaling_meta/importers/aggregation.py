"""From results on single tasks to the paper's benchmarks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scaling_meta.records import Conflict, Score, Status, as_text
from scaling_meta.schema import BENCHMARKS, Benchmark

DECIMALS = 10  # far below any standard error, and free of what the order of a sum does to the last digits


@dataclass(frozen=True)
class Measure:
    """A result on one task: its standard error (None if unknown), and where it was found under which name."""

    value: float
    stderr: float | None
    source: str
    named: str


Measures = Mapping[tuple[str, int, str], Measure]
"""Results of one model by task (as `schema.Benchmark.tasks` names it), shots and metric."""


def scores(model: str, measures: Measures, status: Status | None = None) -> tuple[list[Score], list[str]]:
    """Aggregate as the paper does: the mean over a benchmark's tasks. Second, what was left out and why.

    The standard error of a mean over k tasks with errors s_i is sqrt(sum s_i^2) / k where their questions differ, and at most the mean of
    the s_i where they are the same ones in other words or languages, which is then taken. Where it is not told, that of an accuracy p
    on n questions is sqrt(p (1 - p) / (n - 1)), if p n is a whole number (one answer each) and p is not 0 or 1.
    `status` defaults to "reported" for single tasks and "derived" for means. A benchmark is left out where a task is missing or was run
    with another number of shots.
    """
    found, left_out = [], []
    for benchmark in BENCHMARKS.values():
        taken = {task: measures.get((task, benchmark.shots, benchmark.metric)) for task in benchmark.tasks}
        missing = [task for task, measure in taken.items() if measure is None]
        if missing:
            left_out += _reasons(model, benchmark, missing, measures)
            continue
        taken |= {task: measures.get((task, benchmark.shots, benchmark.metric)) for task in benchmark.optional}
        used = [measure for measure in taken.values() if measure is not None]
        found.append(
            Score(
                model=model, benchmark=benchmark.name, value=round(math.fsum(one.value for one in used) / len(used), DECIMALS),
                stderr=_stderr(used, benchmark), subtasks=len(used), source=_source(used, benchmark),
                status=status or ("reported" if len(used) == 1 else "derived"),
            )
        )  # fmt: skip
    return found, left_out


def disagreements(kept: list[Score], others: list[Score]) -> list[Conflict]:
    """Where two lists of scores of one model differ by more than a millionth, on the benchmarks that both have."""
    by_name = {score.benchmark: score for score in others}
    pairs = [(score, by_name[score.benchmark]) for score in kept if score.benchmark in by_name]
    return [
        Conflict(
            model=score.model, item=score.benchmark, kept=as_text(score.value), other=as_text(other.value),
            kept_source=score.source, other_source=other.source,
        )
        for score, other in pairs
        if abs(score.value - other.value) > 1e-6
    ]  # fmt: skip


def _reasons(model: str, benchmark: Benchmark, missing: list[str], measures: Measures) -> list[str]:
    """Why a benchmark cannot be scored; nothing where none of its tasks was run."""
    shots = sorted({shots for task, shots, metric in measures if task in missing and metric == benchmark.metric})
    other = {of.shots for of in BENCHMARKS.values() if set(of.tasks) & set(missing)}  # MMLU is two benchmarks
    wrong = [count for count in shots if count not in other]
    if wrong:
        return [f"{model}, {missing[0]}: run with {wrong[0]} shots, {benchmark.name} takes {benchmark.shots}"]
    if len(missing) < len(benchmark.tasks):
        return [f"{model}, {benchmark.name}: {len(missing)} of {len(benchmark.tasks)} tasks are missing, such as {missing[0]}"]
    return []


def _stderr(used: list[Measure], benchmark: Benchmark) -> float | None:
    known = [one.stderr for one in used if one.stderr is not None]
    if len(known) == len(used):
        return round((math.fsum(known) if benchmark.items == "shared" else math.hypot(*known)) / len(known), DECIMALS)
    value, questions = used[0].value, benchmark.questions
    if questions and 0 < value < 1 and math.isclose(value * questions, round(value * questions), abs_tol=1e-6):
        return round(math.sqrt(value * (1 - value) / (questions - 1)), DECIMALS)
    return None


def _source(used: list[Measure], benchmark: Benchmark) -> str:
    """Files, tasks under the names they have there, shots and metric."""
    names = sorted({one.named for one in used})
    named = names[0] if len(names) == 1 else f"{_common(names)}*"
    return f"{', '.join(sorted({one.source for one in used}))} {named} {benchmark.shots}-shot {benchmark.metric}"


def _common(names: list[str]) -> str:
    """What all names begin with."""
    first, last = names[0], names[-1]  # the first and last of sorted texts share no more than all do
    return next((first[:length] for length in range(len(first), 0, -1) if last.startswith(first[:length])), "")
