"""The files of a database: CSV tables, read with every problem named by file, row and column."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmcore.errors import UserError
from scaling_meta.records import BadCell, Conflict, Fact, Model, Problem, Record, Score
from scaling_meta.schema import DATA, FIELDS

Rows = Mapping[str, list[tuple[int, dict[str, str]]]]
"""Of each file, its rows with their numbers."""

TEXT_FEATURES = "text_features.csv"
FILES: dict[str, type[Record]] = {
    "models.csv": Model, "facts.csv": Fact, TEXT_FEATURES: Fact, "scores.csv": Score, "conflicts.csv": Conflict,
}  # fmt: skip
"""The files of a database folder: `models.csv` and `facts.csv` are always there. Text features are facts in a file of their own."""

EXCLUSIVE = tuple(name for name in DATA if name != "share_english")
"""The shares that are parts of one whole. English is not: such texts are from the web, books and so on, too."""
_IMPOSSIBLE = 105.0  # whole percents sum to at most 102.5; texts counted twice (academic within web) reach 103.1 in practice

_R = TypeVar("_R", bound=Record)


def read(folder: Path, problems: list[Problem]) -> Rows:
    """The rows of every file in a folder."""
    return {name: _read(folder / name, record, problems) for name, record in FILES.items()}


def parse(rows: Rows, problems: list[Problem]) -> tuple[list[Model], list[Fact], list[Score], list[Conflict]]:
    """The records that the rows hold; what cannot be used is left out and added to `problems`."""
    models = _records("models.csv", Model, rows["models.csv"], problems, None)
    facts: dict[Any, tuple[int, Fact]] = {}
    for name in ("facts.csv", TEXT_FEATURES):
        found = _records(name, Fact, rows[name], problems, models)
        twice = sorted(facts.keys() & found.keys())
        problems += [Problem(name, found[key][0], "model", f"{' '.join(key)} is in facts.csv too") for key in twice]
        facts = found | facts
    scores = _records("scores.csv", Score, rows["scores.csv"], problems, models)
    noted = _records("conflicts.csv", Conflict, rows["conflicts.csv"], problems, models)
    for model in models:
        shares = [facts[model, share] for share in EXCLUSIVE if (model, share) in facts]
        total = sum(float(fact.value) for _, fact in shares)
        if total > _IMPOSSIBLE:
            what = f"the shares of {model} ({', '.join(fact.field for _, fact in shares)}) sum to {total:g} %"
            problems.append(Problem("facts.csv", max(row for row, _ in shares), "value", what))
    return _values(models), _values(facts), _values(scores), _values(noted)


def refuse(problems: list[Problem], folder: Path | None = None) -> None:
    """Raise `UserError` with the first problem, if there is one."""
    if problems:
        more = f" ({len(problems) - 1} more: see scaling-meta validate)" if len(problems) > 1 else ""
        raise UserError(f"{f'{folder}/' if folder else ''}{problems[0]}{more}")


def check_place(folder: Path) -> None:
    """Raise `UserError` if a folder holds anything but a database, which writing one there would remove."""
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which is no part of a database: choose a folder of its own")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet_bytes(columns: list[str], rows: list[dict[str, float | str | None]]) -> bytes:
    """The wide table as a parquet file. Raises: `UserError` without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install 'scaling-meta[parquet]', or export to .csv") from None
    texts = {"model", "family", "organisation", "released", *(name for name, of in FIELDS.items() if of.categories)}
    kinds = {name: pyarrow.string() if name in texts else pyarrow.float64() for name in columns}
    table = pyarrow.table({name: pyarrow.array([row[name] for row in rows], kinds[name]) for name in columns})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _read(path: Path, record: type[Record], problems: list[Problem]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a file with their numbers; those with too few or too many cells are problems."""
    if not path.exists():
        if path.name in ("models.csv", "facts.csv"):
            problems.append(Problem(path.name, 0, "", "the file is missing"))
        return []
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if sorted(header) != sorted(record.columns()):
                unknown = [name for name in header if name not in record.columns()]
                what = f"unknown column {unknown[0]!r}" if unknown else "columns are missing or there twice"
                what += f": they are {','.join(record.columns())}"
                problems.append(Problem(path.name, 1, unknown[0] if unknown else "", what))
                return []
            for cells in reader:
                if len(cells) == len(header):
                    rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
                else:
                    problems.append(Problem(path.name, reader.line_num, "", f"{len(cells)} cells, not {len(header)}"))
    except (csv.Error, UnicodeDecodeError) as error:
        problems.append(Problem(path.name, reader.line_num + 1, "", f"not a CSV file in UTF-8: {error}"))
    return rows


def _records(
    name: str,
    record: type[_R],
    rows: list[tuple[int, dict[str, str]]],
    problems: list[Problem],
    models: Mapping[str, Any] | None,
) -> dict[Any, tuple[int, _R]]:
    """The records of one file by key, with the rows they came from."""
    found: dict[Any, tuple[int, _R]] = {}
    for number, row in rows:
        try:
            parsed = record.parse(row)
            if models is not None and row["model"] not in models:
                raise BadCell("model", f"{row['model']!r} is not in models.csv")
            key = parsed.key
            if key in found:
                what = " ".join(key) if isinstance(key, tuple) else row["model"]
                raise BadCell("model", f"{what} is in row {found[key][0]} too")
            found[key] = number, parsed
        except BadCell as error:
            problems.append(Problem(name, number, error.column, str(error)))
    return found


def _values(records: Mapping[Any, tuple[int, _R]]) -> list[_R]:
    return [record for _, record in records.values()]
