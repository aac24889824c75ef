"""Regressors by name: what is fitted to a table and scores, and what predicts the scores of other tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.boosting import Boosted
from scaling_meta.ensembles import ExtraTrees, LightGBM
from scaling_meta.laws import PowerLaw, Sigmoid
from scaling_meta.schema import SCALING, Benchmark
from scaling_meta.table import Table
from scaling_meta.trend import Trend


@runtime_checkable
class Fitted(Protocol):
    """Predicts scores of any table that has the features it was fitted with."""

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """One score per model."""


@runtime_checkable
class Regressor(Protocol):
    """A frozen dataclass of options. Fitting it twice to the same gives the same."""

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> Fitted:
        """Fit to models with known scores: `y` has no NaN."""


@dataclass(frozen=True)
class Median:
    """The paper's baseline: the median score, whatever the design."""

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedLinear":
        """Take the median."""
        return FittedLinear((), np.array([np.median(y)]))


@dataclass(frozen=True)
class LogLinear:
    """The paper's log-linear baseline: ordinary least squares on log size and log tokens, score = c + a ln N + b ln D.

    Where the two do not determine a and b, the solution of least norm.
    """

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedLinear":
        """Solve the normal equations. Raises: `UserError` where size or tokens are missing."""
        design = _with_constant(table, SCALING)
        return FittedLinear(SCALING, np.linalg.lstsq(design, y, rcond=None)[0])


@dataclass(frozen=True, eq=False)
class FittedLinear:
    """A constant and a coefficient for each feature."""

    features: tuple[str, ...]
    coefficients: Float64[np.ndarray, " terms"]

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The weighted sums. Raises: `UserError` where a feature is missing."""
        return _with_constant(table, self.features) @ self.coefficients


REGRESSORS: Mapping[str, Callable[[], Regressor]] = {
    "median": Median,
    "log-linear": LogLinear,
    "power-law": PowerLaw,
    "sigmoid": Sigmoid,
    "boosted": Boosted,
    "trend": Trend,
    "extra-trees": ExtraTrees,
    "lightgbm": LightGBM,
}
"""The regressors with their default options; `regressor` also gives them the range of a benchmark."""


def regressor(name: str, benchmark: Benchmark | None = None) -> Regressor:
    """The regressor of a name, its scores bounded by the benchmark's range (else by 0 and 1) where it has bounds.

    Raises: `UserError` for an unknown name.
    """
    if name not in REGRESSORS:
        raise UserError(f"there is no model {name}: choose one of {', '.join(REGRESSORS)}")
    made = REGRESSORS[name]()
    if benchmark is not None and isinstance(made, PowerLaw | Sigmoid | Trend):
        return replace(made, bounds=(benchmark.low, benchmark.high))
    return made


def _with_constant(table: Table, features: tuple[str, ...]) -> Float64[np.ndarray, "models terms"]:
    values = table.select(features).values
    for row, column in np.argwhere(np.isnan(values)):
        raise UserError(f"{table.models[row]}: {features[column]} is missing: add it or leave the model out")
    return np.concatenate([np.ones((len(table), 1)), values], axis=1)
