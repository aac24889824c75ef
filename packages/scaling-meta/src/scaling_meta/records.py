"""The records of the database, and the rows they are written as: one model, fact, score or conflict each."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from scaling_meta.schema import BENCHMARKS, FIELDS, number

Status = Literal["reported", "derived", "unverified"]
"""reported: read where the maker of the model or the evaluation wrote it; derived: computed from that; unverified: from a secondary
source, or from memory, and not checked."""


_COLUMNS = (
    "model", "family", "organisation", "released", "item", "field", "benchmark", "value", "stderr", "subtasks", "kept", "other",
    "kept_source", "other_source", "source", "status",
)  # fmt: skip


class BadCell(ValueError):
    """A cell that cannot be used: its column, and what is wrong with it."""

    def __init__(self, column: str, what: str):
        super().__init__(what)
        self.column = column


_R = TypeVar("_R", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records share: `key` names it in the database; `row` and `parse` turn it into cells of a CSV and back."""

    @property
    def key(self) -> Any:
        """What no other record of its kind has."""
        raise NotImplementedError

    def row(self) -> dict[str, str]:
        """The cells, by column."""
        values = ((name, getattr(self, name)) for name in self.columns())
        return {name: value if isinstance(value, str) else as_text(value) for name, value in values}

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """The columns of the file."""
        return tuple(sorted((field.name for field in fields(cls)), key=_COLUMNS.index))

    @classmethod
    def parse(cls: type[_R], row: Mapping[str, str]) -> _R:
        """The record that a row holds. Raises: `BadCell`."""
        return cls(**cls._values(row))

    @classmethod
    def _values(cls, row: Mapping[str, str]) -> dict[str, Any]:
        """The arguments that the cells say. Raises: `BadCell`."""
        return dict(row)


@dataclass(frozen=True, kw_only=True)
class Sourced(Record):
    """A record about a model, with where its values were found."""

    model: str
    source: str
    status: Status

    @classmethod
    def _values(cls, row: Mapping[str, str]) -> dict[str, Any]:
        if not row["model"] or row["model"] != row["model"].strip():
            raise BadCell("model", f"{row['model']!r} is no name of a model")
        if not row["source"]:
            raise BadCell("source", "where the value was found is not said")
        if row["status"] not in get_args(Status):
            raise BadCell("status", f"{row['status']!r} is none of {', '.join(get_args(Status))}")
        return dict(row)


@dataclass(frozen=True, kw_only=True)
class Model(Sourced):
    """A model: its family (models that share design and data, so that one tells of the others), maker and month of release.

    Each may be "", unknown. A model without a family counts as one of its own.
    """

    family: str = ""
    organisation: str = ""
    released: str = ""

    @property
    def key(self) -> str:
        """The name."""
        return self.model

    @classmethod
    def _values(cls, row: Mapping[str, str]) -> dict[str, Any]:
        if row["released"] and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", row["released"]):
            raise BadCell("released", f"{row['released']!r} is not a month as in 2024-05")
        return super()._values(row)


@dataclass(frozen=True, kw_only=True)
class Valued(Sourced):
    """A value for one `item` of a model."""

    value: float | str

    @property
    def item(self) -> str:
        """What the value is of."""
        raise NotImplementedError

    @property
    def key(self) -> tuple[str, str]:
        """Model and item."""
        return self.model, self.item


@dataclass(frozen=True, kw_only=True)
class Fact(Valued):
    """The value of one field of `schema.FIELDS` for one model: a number, or the name of a category."""

    field: str

    @property
    def item(self) -> str:
        """The field."""
        return self.field

    @classmethod
    def _values(cls, row: Mapping[str, str]) -> dict[str, Any]:
        if row["field"] not in FIELDS:
            raise BadCell("field", f"unknown field {row['field']!r}: see scaling_meta.schema.FIELDS")
        return super()._values(row) | {"value": _cell("value", row, FIELDS[row["field"]].parse)}


@dataclass(frozen=True, kw_only=True)
class Score(Valued):
    """The result of a model on a benchmark of `schema.BENCHMARKS`: mean over `subtasks` tasks, and its standard error, None if unknown."""

    benchmark: str
    value: float
    stderr: float | None
    subtasks: int

    @property
    def item(self) -> str:
        """The benchmark."""
        return self.benchmark

    @classmethod
    def _values(cls, row: Mapping[str, str]) -> dict[str, Any]:
        benchmark = BENCHMARKS.get(row["benchmark"])
        if benchmark is None:
            raise BadCell("benchmark", f"unknown benchmark {row['benchmark']!r}: it is none of {', '.join(BENCHMARKS)}")
        value = _cell("value", row, lambda text: number(text, benchmark.low, benchmark.high))
        stderr = _cell("stderr", row, lambda text: number(text, 0) if text else None)
        subtasks = _cell("subtasks", row, lambda text: int(number(text, 1)))
        return super()._values(row) | {"value": value, "stderr": stderr, "subtasks": subtasks}


@dataclass(frozen=True, kw_only=True, order=True)
class Conflict(Record):
    """Two sources that disagree on a model: `item` is a field, benchmark or column of models.csv; `kept` is what the database holds."""

    model: str
    item: str
    kept: str
    other: str
    kept_source: str
    other_source: str

    @property
    def key(self) -> "Conflict":
        """Itself: equal conflicts are one."""
        return self


@dataclass(frozen=True)
class Problem:
    """What is wrong in a file: `row` as an editor counts, the header being row 1, or 0 where the whole file is meant."""

    file: str
    row: int
    column: str
    what: str

    def __str__(self) -> str:
        where = f", row {self.row}" if self.row else ""
        return f"{self.file}{where}{f', column {self.column}' if self.column else ''}: {self.what}"


def as_text(value: float | str | None) -> str:
    """A cell: the shortest text that gives back the same number, whole numbers without a point, nothing for None."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return "" if value is None else str(value)


def _cell(column: str, row: Mapping[str, str], parse: Any) -> Any:
    try:
        return parse(row[column])
    except ValueError as error:
        raise BadCell(column, str(error)) from None
