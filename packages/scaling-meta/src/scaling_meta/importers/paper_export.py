"""The export of the authors' database (nightingal3/llm-pretraining-behaviours, metadata/duckdb): CSV tables in one folder.

Its load.sql has absolute paths, so the tables are read as they are: model_annotations.csv, dataset_info.csv, evaluation_results.csv and,
where it is there, the table of the 61 text features (free_generation_features.csv or all_models_feature_stats*.csv).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.importers import Imported, Options, fact, table
from scaling_meta.importers.aggregation import Measure, disagreements, scores
from scaling_meta.records import Conflict, Fact, Model, Score
from scaling_meta.schema import GENERATION, is_missing, number

ORIGIN = "llm-pretraining-behaviours"
_ARCHITECTURE = {"total_params": "params"} | {
    name: name
    for name in (
        "dimension", "num_heads", "mlp_ratio", "sequence_length", "activation", "attention_variant", "biases", "block_type",
        "layer_norm_type", "positional_embeddings",
    )
}  # fmt: skip
_SUMMARY = "pretraining_summary_"
_DATA = {f"{_SUMMARY}total_tokens_billions": "tokens_billions"} | {
    f"{_SUMMARY}percentage_{name}": f"share_{name}" for name in ("web", "code", "books", "reference", "academic", "english")
}
_DIGITS = 6  # significant ones of a text feature
_METRICS = {"accuracy": "accuracy", "brier_score": "brier"}

_Table = dict[str, tuple[int, dict[str, str]]]


def read(folder: Path, options: Options) -> Imported:
    """The pretrained models of the export, as the paper takes them: size and tokens known, not instruction tuned, with an accuracy.

    Empty cells, "unknown", NaN and -1 are missing. Of results that are there twice, under the old and the new name of a task, the first row
    counts, as in the paper's code, and the other is noted as a conflict if it differs. TruthfulQA is taken from rows with the metric
    "accuracy", as in the paper: results of the old harness, metrics mc1 and mc2, serve only to find conflicts.
    """
    annotations, data = _by_id(folder / "model_annotations.csv"), _by_id(folder / "dataset_info.csv")
    first, second, accuracy = _measures(folder / "evaluation_results.csv")
    tokens = f"{_SUMMARY}total_tokens_billions"
    names = [
        name
        for name, (_, row) in annotations.items()
        if name in accuracy and row["is_instruction_tuned"] != "true" and not is_missing(row["total_params"])
        if name in data and not is_missing(data[name][1][tokens])
    ]
    facts = [
        *_facts(folder / "model_annotations.csv", annotations, names, _ARCHITECTURE),
        *_facts(folder / "dataset_info.csv", data, names, _DATA),
    ]
    for path in sorted({*folder.glob("free_generation_features.csv"), *folder.glob("all_models_feature_stats*.csv")}):
        facts += _facts(path, _by_id(path), names, {name.removeprefix("gen_"): name for name in GENERATION}, _DIGITS)
    results: list[Score] = []
    noted: list[Conflict] = []
    for name in names:
        found, _ = scores(name, first[name], "unverified")
        results += found
        noted += disagreements(found, scores(name, {**first[name], **second[name]}, "unverified")[0])
    source = f"{ORIGIN} model_annotations.csv id"
    models = [Model(model=name, source=source, status="unverified") for name in names]
    left_out = [f"{name}: no pretrained model with size, tokens and an accuracy" for name in annotations if name not in names]
    return Imported(Database.of(models, facts, results, noted), tuple(left_out))


def _by_id(path: Path) -> _Table:
    """The rows of a table by model."""
    header, rows = table(path)
    if "id" not in header:
        raise UserError(f"{path}, row 1: there is no column id")
    found: _Table = {}
    for number_, row in rows:
        if row["id"] in found:
            raise UserError(f"{path}, row {number_}, column id: the model {row['id']} is in row {found[row['id']][0]} too")
        found[row["id"]] = number_, row
    return found


def _facts(path: Path, rows: _Table, names: list[str], columns: Mapping[str, str], digits: int | None = None) -> Iterator[Fact]:
    """The facts in some columns about some models."""
    for name in names:
        number_, row = rows.get(name, (0, {}))
        for column, field in columns.items() if row else ():
            if column not in row:
                raise UserError(f"{path}, row 1: there is no column {column}")
            value = fact(path, number_, column, row, field=field)
            if value is not None:
                rounded = float(f"{value:.{digits}g}") if digits and isinstance(value, float) else value
                source = f"{ORIGIN} {path.name} {column}"
                yield Fact(model=name, field=field, value=rounded, source=source, status="unverified")


def _measures(path: Path) -> tuple[dict[str, dict], dict[str, dict], set[str]]:
    """By model, the first result on each task and another one if there is; and the models that have an accuracy."""
    first: dict[str, dict[tuple[str, int, str], Measure]] = defaultdict(dict)
    second: dict[str, dict[tuple[str, int, str], Measure]] = defaultdict(dict)
    accuracy = set()
    source = f"{ORIGIN} {path.name}"
    for row, cells in table(path)[1]:
        name, task, metric = cells["id"], cells["benchmark"], cells["metric"]
        old = task == "truthfulqa:mc" and metric in ("mc1", "mc2")
        if metric not in _METRICS and not old:
            continue
        accuracy |= {name} if metric == "accuracy" else set()
        value, stderr = (_number(path, row, column, cells) for column in ("metric_value", "metric_stderr"))
        if value is None:
            continue
        measure = Measure(value, stderr, source, task)
        shots = int(number(cells["setting"].removesuffix("-shot"), 0))
        if old:
            second[name][f"truthfulqa_{metric}", shots, "accuracy"] = measure
        else:
            key = _renamed(task), shots, _METRICS[metric]
            (second if key in first[name] else first)[name][key] = measure
    return first, second, accuracy


def _renamed(task: str) -> str:
    return task.replace("hendrycksTest-", "mmlu_").replace("arc:challenge", "arc_challenge")


def _number(path: Path, row: int, column: str, cells: Mapping[str, str]) -> float | None:
    try:
        return None if is_missing(cells[column]) else number(cells[column])
    except ValueError as error:
        raise UserError(f"{path}, row {row}, column {column}: {error}") from None
