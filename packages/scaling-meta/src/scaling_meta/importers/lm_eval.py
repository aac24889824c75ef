"""Results of lm-evaluation-harness, as JSON files of version 0.4 or older, or as the Open LLM Leaderboard wrote them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.importers import Imported, Options, json_object
from scaling_meta.importers.aggregation import Measure, disagreements, scores
from scaling_meta.records import Conflict, Model, Score
from scaling_meta.schema import BENCHMARKS

_TASKS = {task: benchmark.metric for benchmark in BENCHMARKS.values() for task in (*benchmark.tasks, *benchmark.optional)}
_KEYS = {
    "gsm8k": ("exact_match,strict-match", "exact_match,get-answer", "acc"),
    "humaneval": ("pass@1,create_test", "pass@1,none", "pass@1"),
}
"""Where the value is called otherwise than below; names of 0.4 have the filter behind the comma."""
_BY_METRIC = {"accuracy": ("acc,none", "acc"), "brier": ("brier_score,none", "brier_score")}

_Measures = dict[tuple[str, int, str], Measure]


def read(source: Path, options: Options) -> Imported:
    """One file, or every file with results below a folder.

    Tasks are aggregated as in the paper (see `aggregation.scores`); acc and not acc_norm, GSM8K by strict match. Old names are understood
    (hendrycksTest-*, arc:challenge, truthfulqa_mc). Left out, with the reason: tasks run with another number of shots than the benchmark
    takes, or where it is not said; benchmarks of which tasks are missing; runs on a part of the questions (--limit); values that are no
    number. Of two results of a model on a task, that of the first file by name counts; if they differ, a conflict is noted.
    Raises: `UserError` if nothing is left.
    """
    paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
    first: dict[str, _Measures] = {}
    second: dict[str, _Measures] = {}
    left_out: list[str] = []
    for path in paths:
        run = json_object(path)
        if not isinstance(run.get("results"), dict):
            if path == source:
                raise UserError(f"{path} has no results of lm-evaluation-harness: there is no object 'results'")
            continue
        model = options.name or _model(run) or ""
        if not model:
            raise UserError(f"{path} does not name its model: give it with --name")
        for key, measure in _measures(path, run, left_out):
            already = key in first.setdefault(model, {})
            (second.setdefault(model, {}) if already else first[model])[key] = measure
    results: list[Score] = []
    noted: list[Conflict] = []
    for model, measures in first.items():
        found, reasons = scores(model, measures)
        results, left_out = results + found, left_out + reasons
        noted += disagreements(found, scores(model, measures | second.get(model, {}))[0])
    if not results:
        raise UserError(
            f"{source} has no result that can be used: {'; '.join(left_out[:3]) or 'none is on a benchmark of the paper'}"
        )
    models = {score.model: Model(model=score.model, source=score.source, status="reported") for score in reversed(results)}
    return Imported(Database.of(models.values(), [], results, noted), tuple(left_out))


def _measures(path: Path, run: Mapping[str, Any], left_out: list[str]) -> Iterator[tuple[tuple[str, int, str], Measure]]:
    """The results of a file that are on tasks of the paper."""
    if _config(run).get("limit"):
        left_out.append(f"{path.name}: run on a part of the questions, limit {_config(run)['limit']}")
        return
    for named, values in run["results"].items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: results of {named} are no object")
        for task, keys in _tasks(named):
            key = next((key for key in keys if key in values), None)
            if key is None:
                left_out.append(f"{path.name}, {named}: has none of {', '.join(keys)}")
                continue
            shots = _shots(run, named)
            value, (metric, comma, filtered) = _number(values[key]), key.partition(",")
            if shots is None:
                left_out.append(f"{path.name}, {named}: the number of shots is not said")
            elif value is None:
                left_out.append(f"{path.name}, {named}: {key} is {values[key]}")
            else:
                stderr = _number(values.get(f"{metric}_stderr{comma}{filtered}"))
                yield (task, shots, _TASKS[task]), Measure(value, stderr, path.name, named)


def _tasks(named: str) -> list[tuple[str, tuple[str, ...]]]:
    """The tasks of the paper that a result is on, each with the keys its value may have."""
    name = named.split("|")[1] if named.count("|") == 2 else named  # harness|arc:challenge|25, as the leaderboard wrote
    if name in ("truthfulqa_mc", "truthfulqa:mc"):
        return [("truthfulqa_mc1", ("mc1",)), ("truthfulqa_mc2", ("mc2",))]
    name = name.replace("hendrycksTest-", "mmlu_").replace("arc:challenge", "arc_challenge")
    return [(name, _KEYS.get(name, _BY_METRIC[_TASKS[name]]))] if name in _TASKS else []


def _shots(run: Mapping[str, Any], named: str) -> int | None:
    """Number of examples in the prompt: said for the task, or for the run."""
    parts = named.split("|")
    task_config = (run.get("configs") or {}).get(named) or {}
    said = [(run.get("n-shot") or {}).get(named), task_config.get("num_fewshot"), _config(run).get("num_fewshot")]
    said += [int(parts[2])] if len(parts) == 3 and parts[2].isdigit() else []
    return next((count for count in said if isinstance(count, int)), None)


def _config(run: Mapping[str, Any]) -> Mapping[str, Any]:
    config = run.get("config") or run.get("config_general") or {}
    return config if isinstance(config, dict) else {}


def _model(run: Mapping[str, Any]) -> str | None:
    """The name of the model: of the file, or in the arguments that it was loaded with."""
    arguments = _config(run).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    loaded = arguments.get("pretrained") if isinstance(arguments, dict) else None
    name = run.get("model_name") or _config(run).get("model_name") or loaded
    return str(name) if name else None


def _number(value: Any) -> float | None:
    """A finite number, else None ("N/A", NaN, nothing)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
