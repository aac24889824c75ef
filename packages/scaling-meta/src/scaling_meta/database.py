"""The database: facts about models and their scores, each with its source."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from lmcore.record import published, write_atomically
from scaling_meta import files
from scaling_meta.records import Conflict, Fact, Model, Problem, Score, Sourced, Valued, as_text
from scaling_meta.schema import BENCHMARKS, DESIGN, FIELDS, GENERATION, SCALING
from scaling_meta.table import Table

_ROUNDED = 100.5  # five shares rounded to a tenth of a percent sum to at most 100.25
_NOMINAL = 1.1  # sizes in names are rounded, and often leave out embeddings
_BEST = ("reported", "derived", "unverified")

_V = TypeVar("_V", bound=Valued)


@dataclass(frozen=True, eq=False)
class Scores:
    """Results on one benchmark: `values` (NaN where a model was not evaluated) and standard errors (NaN where unknown)."""

    values: Float64[np.ndarray, " models"]
    stderr: Float64[np.ndarray, " models"]


@dataclass(frozen=True)
class Database:
    """Models by name, facts by (model, field), scores by (model, benchmark), and the conflicts met when they were brought together.

    >>> database = Database.shipped()
    >>> database, database.facts["EleutherAI/gpt-j-6b", "positional_embeddings"].value
    (Database(92 models, 5136 facts, 1128 scores), 'rope')
    >>> table = database.table(["log_params", "share_code"])
    >>> table.models[2], table.values[2].round(2).tolist(), table.families[2]
    ('01-ai/Yi-9B', [22.92, 8.53], 'Yi')
    >>> round(float(np.nanmedian(database.scores("gsm8k", table.models).values)), 3)
    0.02
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    facts: Mapping[tuple[str, str], Fact] = field(default_factory=dict)
    results: Mapping[tuple[str, str], Score] = field(default_factory=dict)
    noted: tuple[Conflict, ...] = ()

    def __repr__(self) -> str:
        return f"Database({len(self.models)} models, {len(self.facts)} facts, {len(self.results)} scores)"

    @classmethod
    def of(
        cls,
        models: Iterable[Model] = (),
        facts: Iterable[Fact] = (),
        scores: Iterable[Score] = (),
        noted: Iterable[Conflict] = (),
    ) -> "Database":
        """A database of these records."""
        return cls(
            {model.key: model for model in models}, {fact.key: fact for fact in facts}, {score.key: score for score in scores},
            tuple(sorted(set(noted))),
        )  # fmt: skip

    @classmethod
    @cache
    def shipped(cls) -> "Database":
        """The 92 pretrained models of the paper, with their facts and scores.

        Compiled from the tables of the authors' repository (nightingal3/llm-pretraining-behaviours, commit 5404713): the source of a
        value names the table and the column there. What those tables took it from was not checked, hence the status "unverified".
        Families and months of release are annotations of ours.
        """
        return cls.open(cls.shipped_folder())

    @staticmethod
    def shipped_folder() -> Path:
        """Where the shipped database lies."""
        return Path(str(resources.files(__package__) / "data"))

    @classmethod
    def open(cls, folder: Path) -> "Database":
        """Read a folder. Raises: `UserError` with the file, row and column of the first problem (see `inspect` for all)."""
        database, problems = cls.inspect(folder)
        files.refuse(problems, folder)
        return database

    @classmethod
    def inspect(cls, folder: Path) -> "tuple[Database, list[Problem]]":
        """Read a folder as far as it can be read, and list every problem."""
        problems: list[Problem] = []
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: a database is a folder with {', '.join(files.FILES)}")
        return cls.of(*files.parse(files.read(folder, problems), problems)), problems

    def validate(self) -> list[Problem]:
        """Every problem in these records, with the row they have in the files that `write` makes."""
        problems: list[Problem] = []
        files.parse({name: [*enumerate(rows, start=2)] for name, rows in self._rows().items()}, problems)
        return problems

    def conflicts(self) -> list[Conflict]:
        """Where sources disagree: what merging met, sizes that are not those in the model's name, and shares that sum to over 100."""
        found = [*self.noted]
        for name in self.models:
            size, said = self.facts.get((name, "params")), _size_in(name)
            if size and said and max(float(size.value) / said, said / float(size.value)) > _NOMINAL:
                found.append(_conflict(size, "params", size.value, said, "the name of the model"))
            shares = [self.facts[name, share] for share in files.EXCLUSIVE if (name, share) in self.facts]
            total = sum(float(share.value) for share in shares)
            if total > _ROUNDED:
                found.append(_conflict(shares[-1], "sum of shares", round(total, 6), 100.0, "shares of one whole"))
        return sorted(set(found))

    def table(self, features: Sequence[str] | None = None, *, text_features: bool = False) -> Table:
        """The design matrix: one row per model, sorted by name.

        `features` defaults to those known before a model is run, `schema.DESIGN`; `text_features` appends the 61 of its generations.
        Raises: `UserError` for a feature that is not one.
        """
        names = (*(DESIGN if features is None else features), *(GENERATION if text_features else ()))
        unknown = [name for name in names if name not in _FEATURES]
        if unknown:
            raise UserError(f"there is no feature {unknown[0]}: they are {', '.join(_FEATURES)}")
        models = [self.models[name] for name in sorted(self.models)]
        values = np.array([[self._value(model.model, name) for name in names] for model in models], np.float64)
        return Table(
            models=tuple(model.model for model in models),
            features=names,
            values=values.reshape(len(models), len(names)),
            categories={name: FIELDS[name].categories for name in names if name in FIELDS and FIELDS[name].categories},
            families=tuple(model.family or model.model for model in models),
            released=tuple(model.released for model in models),
        )

    def scores(self, benchmark: str, models: Sequence[str]) -> Scores:
        """Results of `models` on a benchmark. Raises: `UserError` for one that is unknown."""
        if benchmark not in BENCHMARKS:
            raise UserError(f"there is no benchmark {benchmark}: they are {', '.join(BENCHMARKS)}")
        unknown = [name for name in models if name not in self.models]
        if unknown:
            raise UserError(f"the database has no model {unknown[0]}")
        found = [self.results.get((name, benchmark)) for name in models]
        values = [math.nan if score is None else score.value for score in found]
        stderr = [math.nan if score is None or score.stderr is None else score.stderr for score in found]
        return Scores(np.array(values, np.float64), np.array(stderr, np.float64))

    def missing(self) -> dict[str, float]:
        """Of each feature and benchmark, the share of models for which it is not known."""
        table, count = self.table(text_features=True), max(len(self.models), 1)
        shares = dict(zip(table.features, np.isnan(table.values).mean(0).tolist() if len(table) else [], strict=False))
        evaluated = {name: sum(benchmark == name for _, benchmark in self.results) for name in BENCHMARKS}
        return shares | {name: 1 - evaluated[name] / count for name in BENCHMARKS}

    def merge(self, other: "Database", prefer: Literal["old", "new"] = "old") -> "tuple[Database, list[Conflict]]":
        """Join this database and `other`, and tell where they disagree: there this one's value is kept, or with prefer="new" the other's.

        Equal values are no conflict (a millionth apart counts as equal): the better sourced is kept. Merging the same twice changes
        nothing more. The conflicts are noted in the result.
        """
        conflicts: list[Conflict] = []
        models, facts, scores = {**self.models}, {**self.facts}, {**self.results}
        for new in other.models.values():
            old = models.get(new.model)
            models[new.model] = new if old is None else _merged(old, new, prefer, conflicts)
        _merge(facts, other.facts.values(), prefer, conflicts)
        _merge(scores, other.results.values(), prefer, conflicts)
        noted = tuple(sorted({*self.noted, *other.noted, *conflicts}))
        return Database(models, facts, scores, noted), sorted(conflicts)

    def write(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all: the same records give the same bytes, rows sorted so that git shows what changed.

        Raises: `UserError` for records that cannot be, if `folder` exists without `overwrite`, or if it holds anything else.
        """
        files.check_place(folder)
        with published(folder, overwrite=overwrite) as new:
            self.write_files(new)

    def write_files(self, folder: Path) -> None:
        """Write the files into a folder that exists."""
        files.refuse(self.validate())
        for name, rows in self._rows().items():
            write_atomically(folder / name, files.csv_text(files.FILES[name].columns(), rows))

    def wide(self) -> tuple[list[str], list[dict[str, float | str | None]]]:
        """One row per model: its annotations, every field, every benchmark and its standard error; None where missing."""
        columns = ["model", "family", "organisation", "released", *FIELDS]
        columns += [column for name in BENCHMARKS for column in (name, f"{name} stderr")]
        rows: list[dict[str, float | str | None]] = []
        for name, model in sorted(self.models.items()):
            row: dict[str, float | str | None] = dict.fromkeys(columns)
            row |= {column: getattr(model, column) or None for column in columns[1:4]} | {"model": name}
            row |= {field: fact.value for field in FIELDS if (fact := self.facts.get((name, field)))}
            for benchmark in BENCHMARKS:
                if score := self.results.get((name, benchmark)):
                    row |= {benchmark: score.value, f"{benchmark} stderr": score.stderr}
            rows.append(row)
        return columns, rows

    def export(self, path: Path) -> None:
        """Write the wide table as one .csv or, with the extra `parquet`, one .parquet file."""
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
        columns, rows = self.wide()
        if path.suffix == ".csv":
            write_atomically(
                path, files.csv_text(columns, [{name: as_text(value) for name, value in row.items()} for row in rows])
            )
        elif path.suffix == ".parquet":
            write_atomically(path, files.parquet_bytes(columns, rows))
        else:
            raise UserError(f"{path}: export to a file that ends in .csv or .parquet")

    def _value(self, model: str, feature: str) -> float:
        """A cell of the design matrix."""
        fact = self.facts.get((model, {"log_params": "params", "log_tokens": "tokens_billions"}.get(feature, feature)))
        if fact is None:
            return math.nan
        if isinstance(fact.value, str):
            return float(FIELDS[feature].categories.index(fact.value))
        if feature in SCALING:
            return math.log(fact.value) + (math.log(1e9) if feature == "log_tokens" else 0.0)
        return fact.value

    def _rows(self) -> dict[str, list[dict[str, str]]]:
        """The rows of each file, sorted."""
        records: dict[str, list[Any]] = {name: [] for name in files.FILES}
        records["models.csv"] = sorted(self.models.values(), key=lambda model: model.key)
        for fact in sorted(self.facts.values(), key=lambda fact: (fact.model, _ORDER[fact.field])):
            records[files.TEXT_FEATURES if fact.field in GENERATION else "facts.csv"].append(fact)
        records["scores.csv"] = sorted(self.results.values(), key=lambda score: (score.model, _ORDER[score.benchmark]))
        records["conflicts.csv"] = sorted(self.noted)
        return {name: [record.row() for record in found] for name, found in records.items()}


_ORDER = {name: place for place, name in enumerate((*FIELDS, *BENCHMARKS))}
_FEATURES = (*SCALING, *(name for name in FIELDS if name not in ("params", "tokens_billions")))


def _merge(into: dict[tuple[str, str], _V], records: Iterable[_V], prefer: str, conflicts: list[Conflict]) -> None:
    for new in records:
        old = into.setdefault(new.key, new)
        if not _equal(old.value, new.value):
            kept, other = (old, new) if prefer == "old" else (new, old)
            into[new.key] = kept
            conflicts.append(_conflict(kept, kept.item, kept.value, other.value, other.source))
        elif _BEST.index(new.status) < _BEST.index(old.status):
            into[new.key] = new


def _merged(old: Model, new: Model, prefer: str, conflicts: list[Conflict]) -> Model:
    """One model of two: what either leaves empty the other fills."""
    kept, other = (old, new) if prefer == "old" else (new, old)
    names = ("family", "organisation", "released")
    conflicts += [
        _conflict(kept, name, getattr(kept, name), getattr(other, name), other.source)
        for name in names
        if "" != getattr(kept, name) != getattr(other, name) != ""
    ]
    filled = {name: getattr(other, name) for name in names if getattr(other, name) and not getattr(kept, name)}
    empty = not any(getattr(kept, name) for name in names)
    return replace(other if empty else kept, **filled)


def _conflict(kept: Sourced, item: str, value: float | str, other: float | str, other_source: str) -> Conflict:
    return Conflict(
        model=kept.model,
        item=item,
        kept=as_text(value),
        other=as_text(other),
        kept_source=kept.source,
        other_source=other_source,
    )


def _equal(a: float | str, b: float | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _size_in(name: str) -> float | None:
    """The number of weights that a name says, as in pythia-1.4b-deduped."""
    found = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", name.split("/")[-1].lower().replace("_", "-"))
    return float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]] if found else None
