"""The next model to evaluate: the one whose score would tell most about the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.table import Table

_FAMILY = (0.1, 0.3, 1.0, 3.0, 10.0)  # variance of families and of the design's effects, in units of the noise's
_DESIGN = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: by which share its score, and those of the candidates before it, lower the mean variance of prediction."""

    model: str
    family: str
    reduction: float


@dataclass(frozen=True, eq=False)
class LinearModel:
    """score = c + w . design + effect of the family + noise, all normal; variances in units of the noise's.

    `design` and `family` are the prior variances of each weight (of features with unit spread) and of the families' effects.
    """

    design: float
    family: float

    def kernel(self, rows: "Encoded", columns: "Encoded") -> Float64[np.ndarray, "rows columns"]:
        """Prior covariance of the scores of two sets of models; the constant has variance 100."""
        same = np.array(rows.families)[:, None] == np.array(columns.families)[None]
        return 100.0 + self.design * rows.values @ columns.values.T + self.family * same


@dataclass(frozen=True, eq=False)
class Encoded:
    """Models as numbers without gaps, and their families."""

    values: Float64[np.ndarray, "models columns"]
    families: tuple[str, ...]


def next_models(
    evaluated: Table, y: Float64[np.ndarray, " models"], candidates: Table, *, targets: Table | None = None, count: int = 5
) -> list[Candidate]:
    """Choose `count` of the candidates in turn, each the one that most lowers the mean variance of the predicted scores of `targets`.

    V-optimal design for `LinearModel`, whose two variances are those of a grid under which `y` is most likely. The variance of the score of
    target t falls by c(t, x)^2 / (1 + c(x, x)) when x is evaluated, c being the covariance given what is evaluated already; it does not
    depend on the score that x will get, so the second is chosen as if the first were done. `targets` are all models by default. The same
    input gives the same order; of equal candidates the first is taken.

    Raises: `UserError` if no model is evaluated, or there is no candidate.
    Source: V-optimality (Welch 1984); for choosing models to evaluate, ObsScaling, Ruan et al. 2024, section 5.
    """
    if not len(evaluated) or not len(candidates):
        raise UserError(f"{len(evaluated)} models with a score and {len(candidates)} candidates: it takes at least one of each")
    tables = [evaluated, candidates, targets] if targets is not None else [evaluated, candidates]
    done, pool, *asked = _encoded(tables)
    model = _likeliest(done, y)
    every = asked[0] if asked else Encoded(np.concatenate([done.values, pool.values]), done.families + pool.families)
    inverse = np.linalg.inv(model.kernel(done, done) + np.eye(len(evaluated)))

    def given(rows: Encoded, columns: Encoded) -> np.ndarray:
        return model.kernel(rows, columns) - model.kernel(rows, done) @ inverse @ model.kernel(done, columns)

    cross, own = given(every, pool), given(pool, pool)
    start = float(np.trace(given(every, every)))
    chosen: list[Candidate] = []
    left, gained = [*range(len(candidates))], 0.0
    while left and len(chosen) < count:
        falls = np.square(cross[:, left]).sum(0) / (1 + own[left, left])
        best = left[int(np.argmax(np.round(falls, 12)))]
        gained += float(falls.max())
        chosen.append(Candidate(candidates.models[best], candidates.families[best], gained / start))
        scale = 1 + own[best, best]
        cross, own = cross - np.outer(cross[:, best], own[best]) / scale, own - np.outer(own[:, best], own[best]) / scale
        left.remove(best)
    return chosen


def _likeliest(done: Encoded, y: Float64[np.ndarray, " models"]) -> LinearModel:
    """The variances of the grid with the highest likelihood of y, the noise's own variance being the likeliest for each."""

    def log_likelihood(model: LinearModel) -> float:
        covariance = model.kernel(done, done) + np.eye(len(y))
        centred = y - y.mean()
        return -0.5 * (
            np.linalg.slogdet(covariance)[1] + len(y) * np.log(centred @ np.linalg.solve(covariance, centred) + 1e-12)
        )

    return max((LinearModel(design, family) for design in _DESIGN for family in _FAMILY), key=log_likelihood)


def _encoded(tables: Sequence[Table]) -> list[Encoded]:
    """Numbers with mean 0 and variance 1 over all tables, 0 where missing; a column for each category, and for what is missing."""
    values = np.concatenate([one.select(tables[0].features).values for one in tables])
    columns = []
    for name, column in zip(tables[0].features, values.T, strict=True):
        known = ~np.isnan(column)
        if name in tables[0].categories:
            columns += [(column == code).astype(np.float64) for code in np.unique(column[known])]
        elif known.any() and (spread := column[known].std()) > 0:
            columns.append(np.where(known, (column - column[known].mean()) / spread, 0.0))
        if not known.all():
            columns.append((~known).astype(np.float64))
    stacked = np.column_stack([np.zeros(len(values)), *columns])
    ends = np.cumsum([len(one) for one in tables])[:-1]
    return [Encoded(part, one.families) for part, one in zip(np.split(stacked, ends), tables, strict=True)]
