"""Intervals calibrated by family: how wrong predictions were for families that the fit had not seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.regressors import Fitted, Regressor
from scaling_meta.splits import family_folds
from scaling_meta.table import Table

Predictions = Float64[np.ndarray, "models"]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Predictions with the ends of their intervals; an end is infinite where there are too few families for the level."""

    values: Predictions
    low: Predictions
    high: Predictions
    level: float

    def within(self, low: float, high: float) -> "Intervals":
        """The intervals cut to the range that a score can have (values are left as predicted)."""
        return Intervals(self.values, np.clip(self.low, low, high), np.clip(self.high, low, high), self.level)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A regressor fitted to all families, and to all but each: a jackknife+ over families.

    The interval of x holds the middle of the values mu_k(x) +- r, where mu_k was fitted without family k and r is the absolute error that
    it makes for a model of k. All families weigh the same, 1 / (K + 1), shared among their models; the last part lies at infinity, for
    the family that is asked about. At level 1 - a the interval covers a model of a new family with probability at least 1 - 2 a, if
    families are exchangeable (drawn alike, the new one too), and in practice about 1 - a. Nothing is promised for each design or family by
    itself: one family that is unlike the others is not covered. With K families, levels above K / (K + 1) have no finite interval.

    Source: hierarchical jackknife+, Lee, Barber and Willett 2023; jackknife+, Barber et al. 2021, theorem 1.
    """

    names: tuple[str, ...]
    full: Fitted
    without: tuple[Fitted, ...]
    residuals: tuple[np.ndarray, ...]
    """Of each family, score minus prediction without it."""
    table: Table

    @classmethod
    def fit(cls, regressor: Regressor, table: Table, y: Predictions) -> "Calibrated":
        """Fit once to all models and once without each family. Raises: `UserError` if there is only one family."""
        splits = family_folds(table.families)
        without = tuple(regressor.fit(table.rows(split.train), y[split.train]) for split in splits)
        residuals = tuple(
            y[split.test] - fitted.predict(table.rows(split.test)) for split, fitted in zip(splits, without, strict=True)
        )
        return cls(tuple(split.held_out for split in splits), regressor.fit(table, y), without, residuals, table)

    @property
    def finest(self) -> float:
        """The highest level that has a finite interval."""
        return len(self.names) / (len(self.names) + 1)

    def guarantee(self, level: float) -> str:
        """What an interval of this level promises, in a sentence."""
        bound = max(0.0, 1 - 2 * (1 - level))
        return (
            f"jackknife+ over {len(self.names)} families: covers a model of a new family, drawn like these, with probability at least "
            f"{bound:.0%} (about {level:.0%} in practice); steps of 1/{len(self.names) + 1}, nothing finite above {self.finest:.1%}"
        )

    def predict(self, table: Table, level: float = 0.9) -> Intervals:
        """The scores of models of a new family. Raises: `UserError` if the level is not between 0 and 1."""
        errors, centres = [np.abs(one) for one in self.residuals], [fitted.predict(table) for fitted in self.without]
        return _intervals(self.full.predict(table), centres, errors, level)

    def change(self, before: Table, after: Table, level: float = 0.9) -> Intervals:
        """How much higher designs `after` score than designs `before`, row by row, each pair of one family.

        Calibrated like the scores, on all pairs of siblings: the error is that of the predicted difference, so that what a family has in
        common cancels. Families of one model have no pair and are left out.
        """
        errors, centres = [], []
        for one, fitted in zip(self.residuals, self.without, strict=True):
            if len(one) > 1:
                first, second = np.triu_indices(len(one), 1)
                errors.append(np.abs(one[second] - one[first]))
                centres.append(fitted.predict(after) - fitted.predict(before))
        return _intervals(self.full.predict(after) - self.full.predict(before), centres, errors, level)


def weighted_quantile(values: Predictions, weights: Predictions, level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it; infinite if all weight is less than that.

    >>> weighted_quantile(np.array([3.0, 1.0, 2.0]), np.full(3, 0.25), 0.5), weighted_quantile(np.array([1.0]), np.array([0.5]), 0.9)
    (2.0, inf)
    """
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) >= level - 1e-12
    return float(values[order][reached.argmax()]) if reached.any() else math.inf


def _intervals(values: Predictions, centres: Sequence[np.ndarray], errors: Sequence[np.ndarray], level: float) -> Intervals:
    if not 0 < level < 1:
        raise UserError(f"the level is {level:g}: it must lie between 0 and 1")
    share = np.concatenate([np.empty(0), *(np.full(len(one), 1 / ((len(errors) + 1) * len(one))) for one in errors)])
    low, high = np.empty(len(values)), np.empty(len(values))
    for row in range(len(values)):
        spread = [(centre[row], error) for centre, error in zip(centres, errors, strict=True)]
        above, below = (np.concatenate([np.empty(0), *(sign * at + error for at, error in spread)]) for sign in (1, -1))
        low[row], high[row] = -weighted_quantile(below, share, level), weighted_quantile(above, share, level)
    return Intervals(values, low, high, level)
