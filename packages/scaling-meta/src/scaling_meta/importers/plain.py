"""A plain CSV: one row per model, columns that are fields, benchmarks and annotations or are mapped to them."""

from pathlib import Path

from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.importers import ANNOTATIONS, Imported, Options, table
from scaling_meta.records import BadCell, Fact, Model, Score
from scaling_meta.schema import BENCHMARKS, FIELDS, is_missing


def read(path: Path, options: Options) -> Imported:
    """Read a table such as `Database.export` writes.

    A column is `model`, an annotation (family, organisation, released), a field, a benchmark, or "<benchmark> stderr"; `options.columns`
    names those that are called otherwise, "-" for what is to be left out. Shares are in percent, tokens in billions.
    """
    header, rows = table(path)
    meaning = {column: options.columns.get(column, column) for column in header}
    _check(path, meaning, options)
    models, facts, scores = {}, [], []
    source, status = (options.cite, "reported") if options.cite else (path.name, "unverified")
    for row, cells in rows:
        by_meaning = {meaning[column]: (column, text.strip()) for column, text in cells.items() if meaning[column] != "-"}
        known = {name: text for name, (_, text) in by_meaning.items() if name in ANNOTATIONS or not is_missing(text)}
        name = known.get("model", "")
        if name in models:
            raise UserError(f"{path}, row {row}, column {by_meaning['model'][0]}: {name} is there twice")
        sourced = {"model": name, "source": source, "status": status}
        item = "model"
        try:
            models[name] = Model.parse(sourced | {item: known.get(item, "") for item in ANNOTATIONS})
            for item in known:
                if item in FIELDS:
                    facts.append(Fact.parse(sourced | {"field": item, "value": known[item]}))
                elif item in BENCHMARKS:
                    tasks, stderr = str(len(BENCHMARKS[item].tasks)), known.get(f"{item} stderr", "")
                    cells_of = {"benchmark": item, "value": known[item], "stderr": stderr, "subtasks": tasks}
                    scores.append(Score.parse(sourced | cells_of))
        except BadCell as error:
            at = f"{item} stderr" if error.column == "stderr" else error.column if error.column in by_meaning else item
            raise UserError(f"{path}, row {row}, column {by_meaning[at][0]}: {error}") from None
    return Imported(Database.of(models.values(), facts, scores))


def _check(path: Path, meaning: dict[str, str], options: Options) -> None:
    """Every column means something, and no two the same."""
    for column in options.columns:
        if column not in meaning:
            raise UserError(f"--map {column}: {path} has no such column, but {', '.join(meaning)}")
    allowed = {"model", "-", *ANNOTATIONS, *FIELDS, *BENCHMARKS, *(f"{name} stderr" for name in BENCHMARKS)}
    for column, name in meaning.items():
        if name not in allowed:
            advice = f"--map '{column}=FIELD', or --map '{column}=-' to leave it out"
            raise UserError(f"{path}, row 1: unknown column {name!r}: {advice}; see scaling_meta.schema for the fields")
    names = [name for name in meaning.values() if name != "-"]
    twice = [name for name in names if names.count(name) > 1]
    if twice or "model" not in names:
        raise UserError(
            f"{path}, row 1: {f'{twice[0]} is there twice' if twice else 'no column is the model: --map COLUMN=model'}"
        )
