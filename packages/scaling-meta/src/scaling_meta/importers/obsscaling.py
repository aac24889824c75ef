"""The table of ObsScaling (Ruan et al. 2024, ryoungj/ObsScaling, base_llm_benchmark_eval.csv): sizes, tokens and leaderboard scores."""

from pathlib import Path

from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.importers import Imported, Options, fact, table
from scaling_meta.records import Fact, Model, Score
from scaling_meta.schema import BENCHMARKS, is_missing, number

ORIGIN = "ObsScaling"
_FACTS = {"Model Size (B)": ("params", 1e9), "Pretraining Data Size (T)": ("tokens_billions", 1e3)}
_SCORES = {"MMLU": "mmlu_5shot", "Winograd": "winogrande", "GSM8K": "gsm8k", "HumanEval": "humaneval"}
_OTHER_METRICS = {"ARC-C": "acc_norm", "HellaSwag": "acc_norm", "TruthfulQA": "mc2 alone"}


def read(path: Path, options: Options) -> Imported:
    """Every model of the table.

    MMLU (5-shot), Winogrande, GSM8K and HumanEval are what the paper measures. ARC, HellaSwag and TruthfulQA are there in other metrics of
    the leaderboard (length-normalised accuracy, mc2 alone), which are 0.03, 0.18 and 0.16 away in the middle: they are left out.
    """
    header, rows = table(path)
    for column in ("Model", "Model Family", *_FACTS, *_SCORES):
        if column not in header:
            raise UserError(f"{path}, row 1: there is no column {column!r}: this is not a table of ObsScaling")
    models: dict[str, Model] = {}
    facts, scores = [], []
    for row, cells in rows:
        name = cells["Model"]
        if name in models:
            raise UserError(f"{path}, row {row}, column Model: {name} is there twice")
        source = f"{ORIGIN} {path.name}"
        models[name] = Model(model=name, family=cells["Model Family"], source=f"{source} Model Family", status="unverified")
        for column, (field, scale) in _FACTS.items():
            value = fact(path, row, column, cells, field=field, scale=scale)
            if value is not None:
                facts.append(Fact(model=name, field=field, value=value, source=f"{source} {column}", status="unverified"))
        for column, benchmark in _SCORES.items():
            if not is_missing(cells[column]):
                try:
                    value = number(cells[column], BENCHMARKS[benchmark].low, BENCHMARKS[benchmark].high)
                except ValueError as error:
                    raise UserError(f"{path}, row {row}, column {column}: {error}") from None
                tasks = len(BENCHMARKS[benchmark].tasks)
                scores.append(
                    Score(model=name, benchmark=benchmark, value=round(value, 10), stderr=None, subtasks=tasks,
                          source=f"{source} {column}", status="unverified")
                )  # fmt: skip
    left_out = [f"column {name}: its metric is {metric}" for name, metric in _OTHER_METRICS.items() if name in header]
    return Imported(Database.of(models.values(), facts, scores), tuple(left_out))
