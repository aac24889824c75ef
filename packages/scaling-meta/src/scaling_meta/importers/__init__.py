"""Importers: what others have written about models, as records of the database."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from lmcore.errors import UserError
from scaling_meta.database import Database
from scaling_meta.records import BadCell, Fact, Model
from scaling_meta.schema import FIELDS, is_missing, number

Kind = Literal["hf", "lm-eval", "paper", "obsscaling", "database", "csv"]
"""hf: model folder of Hugging Face; lm-eval: results of lm-evaluation-harness; paper: the export of the authors' database; obsscaling: the
table of ObsScaling; database: a folder that `Database.write` made; csv: a plain table."""
ANNOTATIONS = ("family", "organisation", "released")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person says besides the source.

    `name`: the model's. `given`: values by field or annotation, which take the place of what is read; "unknown" removes it. `columns`:
    for a plain CSV, the field of each column ("-" to leave it out). `cite`: where `given` and a plain CSV are from; without it their status
    is "unverified".
    """

    name: str | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    cite: str | None = None


@dataclass(frozen=True)
class Imported:
    """What was read, and what was not and why."""

    database: Database
    left_out: tuple[str, ...] = ()


def load(source: Path, kind: Kind | None = None, options: Options | None = None) -> Imported:
    """Read `source`, of the kind that it looks like if none is named.

    Raises: `UserError` that names the file, row and column, or the key, and says what to do.
    """
    options, kind = options or Options(), kind or detect(source)
    unknown = [name for name in options.given if name not in FIELDS and name not in ANNOTATIONS]
    if unknown:
        raise UserError(f"--set {unknown[0]}: it is no field: they are {', '.join([*ANNOTATIONS, *FIELDS])}")
    if options.columns and kind != "csv":
        raise UserError(f"--map is for a plain CSV, and {source} is read as {kind}")
    if kind == "database":
        imported = Imported(Database.open(source))
    else:
        read: Callable[[Path, Options], Imported] = import_module(f"{__name__}.{_MODULES[kind]}").read
        imported = read(source, options)
    return replace(imported, database=_with_given(imported.database, options, source))


def detect(source: Path) -> Kind:
    """The kind of a file or folder. Raises: `UserError` if it is none."""
    if source.is_dir():
        marks: dict[str, Kind] = {"model_annotations.csv": "paper", "config.json": "hf", "models.csv": "database"}
        for name, kind in marks.items():
            if (source / name).is_file():
                return kind
        if any(source.rglob("*.json")):
            return "lm-eval"
        raise UserError(f"{source} has no config.json, results of lm-evaluation-harness or tables: nothing to import")
    if not source.is_file():
        raise UserError(f"{source} does not exist")
    if source.suffix == ".csv":
        return "obsscaling" if "Model Family" in table(source)[0] else "csv"
    if source.suffix == ".json":
        return "lm-eval"
    raise UserError(f"{source} is neither a .csv nor a .json file nor a folder: name its kind with --kind")


def table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Columns and numbered rows of a CSV file. Raises: `UserError` with the row at fault."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header, rows = next(reader, []), []
            for cells in reader:
                if len(cells) != len(header):
                    raise UserError(f"{path}, row {reader.line_num}: {len(cells)} cells, not {len(header)}")
                rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
    twice = {name for name in header if header.count(name) > 1}
    if not header or twice:
        raise UserError(f"{path}, row 1: {f'the column {min(twice)} is there twice' if twice else 'it is empty'}")
    return header, rows


def json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises: `UserError` with the line at fault."""
    try:
        value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError, FileNotFoundError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def fact(path: Path, row: int, column: str, cells: Mapping[str, str], *, field: str, scale: float = 1.0) -> float | str | None:
    """The value of a field in a cell, times `scale`; None where it is missing. Raises: `UserError` with file, row and column."""
    text = cells[column].strip()
    if is_missing(text):
        return None
    try:
        return FIELDS[field].parse(text if scale == 1.0 else repr(round(number(text) * scale, 6)))
    except ValueError as error:
        raise UserError(f"{path}, row {row}, column {column}: {error}") from None


def _with_given(database: Database, options: Options, source: Path) -> Database:
    """The database with the values of `--set`, which are those of its one model."""
    if not options.given:
        return database
    if len(database.models) != 1:
        raise UserError(f"--set is for one model, and {source} has {len(database.models)}")
    (model,) = database.models.values()
    cite, status = options.cite or "command line", "reported" if options.cite else "unverified"
    facts, noted = dict(database.facts), {name: text for name, text in options.given.items() if name in ANNOTATIONS}
    try:
        for name, text in options.given.items():
            facts.pop((model.model, name), None)
            if name in FIELDS and not is_missing(text):
                row = {"model": model.model, "field": name, "value": text, "source": cite, "status": status}
                facts[model.model, name] = Fact.parse(row)
        if noted:
            model = Model.parse(model.row() | noted | {"source": cite, "status": status})
    except BadCell as error:
        raise UserError(f"--set {name}: {error}") from None
    return replace(database, models={model.model: model}, facts=facts)


_MODULES = {"hf": "hf", "lm-eval": "lm_eval", "paper": "paper_export", "obsscaling": "obsscaling", "csv": "plain"}
