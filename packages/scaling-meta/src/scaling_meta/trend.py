"""A monotone trend in size and data, and trees for what it leaves: predicts beyond the largest model seen, where trees alone are flat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from scaling_meta.laws import FittedLaw, PowerLaw, Sigmoid
from scaling_meta.ops.bins import Bins, binned
from scaling_meta.ops.forests import Forests, boost
from scaling_meta.splits import family_numbers
from scaling_meta.table import Table


@dataclass(frozen=True)
class Trend:
    """score = trend(N, D) + weight x forest(all features), within `bounds`.

    The trend is the mean of `PowerLaw` and `Sigmoid`: monotone in size and in tokens, and of two shapes, since the data do not say which
    is right beyond their end. The forest is boosted on the residuals. How much of it to believe, from 0 to 1, is measured on families
    that it has not seen: `folds` groups of families are held out in turn, and the weight is the least-squares slope of their residuals
    on what the forest predicts for them (stacking, Breiman 1996). With a single family nothing is measured, and the weight is 0.
    """

    bounds: tuple[float, float] = (0.0, 1.0)
    folds: int = 5
    depth: int = 3
    learning_rate: float = 0.1
    trees: int = 100

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedTrend":
        """Fit both laws, then the forests. Raises: `UserError` where size or tokens are missing."""
        laws = PowerLaw(self.bounds).fit(table, y), Sigmoid(self.bounds).fit(table, y)
        residual = y - _trend(laws, table)
        groups = _groups(table.families, self.folds)
        unseen_by = [groups != group for group in range(groups.max() + 1)] if groups.any() else []
        kept = np.stack([*unseen_by, np.ones(len(table), np.bool_)])
        bins, columns = binned(table.values), np.ones((len(kept), len(table.features)), np.bool_)
        forests = boost(
            bins, residual[None], kept, columns, depth=self.depth, learning_rate=self.learning_rate, trees=self.trees
        )
        unseen = forests.predict(bins.codes).astype(np.float64)[groups, np.arange(len(table))]
        length = float(unseen @ unseen) if groups.any() else 0.0
        weight = min(max(float(residual @ unseen) / length, 0.0), 1.0) if length else 0.0
        return FittedTrend(laws, table.features, bins, forests, weight, self.bounds)


@dataclass(frozen=True, eq=False)
class FittedTrend:
    """The laws, the forest (the last of `forests`) and its weight."""

    laws: tuple[FittedLaw, FittedLaw]
    features: tuple[str, ...]
    bins: Bins
    forests: Forests
    weight: float
    bounds: tuple[float, float]

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The trend and the weighted forest. Raises: `UserError` where size or tokens are missing."""
        codes = self.bins.encode(table.select(self.features).values)
        forest = self.forests.predict(codes)[-1].astype(np.float64)
        return np.clip(_trend(self.laws, table) + self.weight * forest, *self.bounds)


def _trend(laws: Sequence[FittedLaw], table: Table) -> Float64[np.ndarray, " models"]:
    return np.mean([law.predict(table) for law in laws], axis=0)


def _groups(families: Sequence[str], folds: int) -> np.ndarray:
    """The group of each row: families, largest first, each to the smallest group so far."""
    family = family_numbers(families)
    sizes = np.bincount(family)
    group, filled = np.zeros(len(sizes), np.int64), np.zeros(min(folds, len(sizes)), np.int64)
    for number in np.argsort(-sizes, kind="stable"):
        group[number] = filled.argmin()
        filled[filled.argmin()] += sizes[number]
    return group[family]
