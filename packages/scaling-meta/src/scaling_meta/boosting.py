"""The paper's regressor: gradient-boosted trees whose setting is searched for by cross-validation."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from scaling_meta.ops.bins import Bins, binned
from scaling_meta.ops.forests import Forests, boost, held_out_errors
from scaling_meta.splits import random_folds
from scaling_meta.table import Table

Setting = tuple[int, float, int]
"""Depth, learning rate, trees."""
GRID: tuple[Setting, ...] = tuple(
    (depth, rate, trees) for depth in (2, 3, 5) for rate in (0.01, 0.1, 0.3) for trees in (50, 100)
)
"""The paper's 18 settings."""


@dataclass(frozen=True)
class Boosted:
    """Boosted trees with the setting of `grid` that has the least mean absolute error over `folds` random folds of the training models.

    Of equal settings the first is taken. A grid of one is not searched. Missing values go where they lower the loss. Categories enter as
    their codes, in which the paper's code has them too, so that a split can only part them in that order; with `native`, as one 0/1
    column per category instead. All forests of the search are fitted in one call, those of 50 trees as prefixes of those of 100.

    Source: the paper's `XGBRegressor` in scikit-learn's `GridSearchCV`, section A of its code.
    """

    grid: tuple[Setting, ...] = GRID
    folds: int = 3
    seed: int = 0
    native: bool = False

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedBoosted":
        """Search and fit. Raises: `UserError` if there are fewer models than folds to search with."""
        columns = _one_column_per_category(table) if self.native else table
        bins = binned(columns.values)
        setting = self.grid[0] if len(self.grid) == 1 else self._best(bins, y)
        depth, rate, trees = setting
        every = np.ones((1, len(table)), bool), np.ones((1, len(columns.features)), bool)
        forest = boost(bins, y[None], *every, depth=depth, learning_rate=rate, trees=trees)
        return FittedBoosted(table.features, self.native, setting, bins, forest)

    def _best(self, bins: Bins, y: Float64[np.ndarray, " models"]) -> Setting:
        splits = random_folds(len(y), self.folds, (self.seed,))
        forests = [*dict.fromkeys((depth, rate) for depth, rate, _ in self.grid)]
        prefixes = sorted({trees for *_, trees in self.grid})
        train, test = (np.zeros((len(splits), len(y)), bool) for _ in range(2))
        for number, one in enumerate(splits):
            train[number, one.train], test[number, one.test] = True, True
        fold, forest = np.indices((len(splits), len(forests))).reshape(2, -1)
        depths, rates = np.array([depth for depth, _ in forests]), np.array([rate for _, rate in forests])
        columns = np.ones((len(fold), bins.codes.shape[1]), bool)
        errors = held_out_errors(
            bins,
            y[None],
            train[fold],
            test[fold],
            columns,
            depth=depths[forest],
            learning_rate=rates[forest],
            prefixes=prefixes,
        )
        mean = errors.reshape(len(splits), len(forests), len(prefixes)).mean(0)
        found = [mean[forests.index((depth, rate)), prefixes.index(trees)] for depth, rate, trees in self.grid]
        return self.grid[int(np.argmin(found))]


@dataclass(frozen=True, eq=False)
class FittedBoosted:
    """One forest, and how a table becomes its codes."""

    features: tuple[str, ...]
    native: bool
    setting: Setting
    bins: Bins
    forest: Forests

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The prediction of the forest. Raises: `UserError` if a feature is not there."""
        table = table.select(self.features)
        columns = _one_column_per_category(table) if self.native else table
        return self.forest.predict(self.bins.encode(columns.values))[0].astype(np.float64)


def _one_column_per_category(table: Table) -> Table:
    """Replace each categorical feature by a 0/1 column for each of its categories, NaN where it is missing."""
    features: list[str] = []
    columns = []
    for name, column in zip(table.features, table.values.T, strict=True):
        names = table.categories.get(name)
        features += [name] if names is None else [f"{name} {one}" for one in names]
        columns += (
            [column] if names is None else [np.where(np.isnan(column), np.nan, column == code) for code in range(len(names))]
        )
    return replace(table, features=tuple(features), values=np.stack(columns, 1), categories={})
