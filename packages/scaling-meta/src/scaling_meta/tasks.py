"""What the commands that explain and predict share: the models of a task, one model's design, and results as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.database import Database, Scores
from scaling_meta.schema import BENCHMARKS, DESIGN
from scaling_meta.table import Table


@dataclass(frozen=True, eq=False)
class Task:
    """The models with a score on a benchmark, and those without one."""

    name: str
    table: Table
    scores: Scores
    unscored: Table

    @property
    def y(self) -> Float64[np.ndarray, " models"]:
        """The scores."""
        return self.scores.values


def read_task(database: Database, name: str, features: Sequence[str] = DESIGN) -> Task:
    """The models of a benchmark. Raises: `UserError` for an unknown one, or if models of fewer than two families have a score."""
    table = database.table(features)
    scores = database.scores(name, table.models)
    known = ~np.isnan(scores.values)
    scored = table.rows(known)
    if len(set(scored.families)) < 2:
        raise UserError(
            f"{len(scored)} models of {len(set(scored.families))} families have a score on {name}: it takes two families"
        )
    return Task(name, scored, Scores(scores.values[known], scores.stderr[known]), table.rows(~known))


def task_names(named: Sequence[str]) -> tuple[str, ...]:
    """The benchmarks named, or all. Raises: `UserError` for one that is unknown."""
    unknown = [name for name in named if name not in BENCHMARKS]
    if unknown:
        raise UserError(f"there is no benchmark {unknown[0]}: they are {', '.join(BENCHMARKS)}")
    return tuple(dict.fromkeys(named)) or tuple(BENCHMARKS)


def open_database(folder: Path | None) -> Database:
    """The database in a folder, or the shipped one."""
    return Database.open(folder) if folder else Database.shipped()


def design_in(folder: Path, given: Mapping[str, str], features: Sequence[str] = DESIGN) -> Table:
    """The design of a model folder of Hugging Face, with values that no config has. Raises: `UserError` if the tokens are not given."""
    from scaling_meta.importers import Options, load

    table = load(folder, "hf", Options(given=given)).database.table(features)
    if np.isnan(table.column("log_tokens")).any():
        raise UserError(f"{folder} does not say how many tokens {table.models[0]} was trained on: give tokens_billions=...")
    return table


def model_in(database: Database, name: str, features: Sequence[str] = DESIGN) -> Table:
    """The design of a model of the database, named in full or by its last part. Raises: `UserError` if there is none, or more than one."""
    table = database.table(features)
    found = [row for row, model in enumerate(table.models) if name == model]
    found = found or [row for row, model in enumerate(table.models) if name.lower() == model.split("/")[-1].lower()]
    if len(found) != 1:
        what = f"more than one model {name}: give its full name" if found else f"no model {name}, nor is there such a folder"
        raise UserError(f"the database has {what}")
    return table.rows(np.array(found))


def as_fields(design: Table) -> dict[str, float | str | None]:
    """A design (a table of one row) by field: categories by name, size and tokens themselves; None where unknown."""
    fields_of: dict[str, float | str | None] = {}
    for name, value in zip(design.features, design.values[0].tolist(), strict=True):
        field, unit = {"log_params": ("params", 1.0), "log_tokens": ("tokens_billions", 1e9)}.get(name, (name, None))
        if math.isnan(value):
            fields_of[field] = None
        elif name in design.categories:
            fields_of[field] = design.categories[name][int(value)]
        else:
            fields_of[field] = value if unit is None else float(f"{math.exp(value) / unit:.10g}")
    return fields_of


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs of an option. Raises: `UserError` for one that is not, or is there twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{option} {text}: write NAME=VALUE")
        if name in found:
            raise UserError(f"{option} {name} is there twice")
        found[name] = value
    return found


def plain(value: Any) -> Any:
    """A result as JSON has it: dataclasses as objects, arrays as lists, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
