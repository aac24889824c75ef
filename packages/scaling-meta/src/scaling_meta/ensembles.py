"""Other tree ensembles: extremely randomised trees of scikit-learn, boosted trees of LightGBM."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.table import Table


@dataclass(frozen=True)
class ExtraTrees:
    """The mean of `trees` extremely randomised trees, each grown on all models until its leaves are pure.

    A category becomes one 0/1 column per value seen in training, none of them 1 where it is missing or new. A missing number is replaced by
    the median of the training models, and a column says that it was missing.

    Source: Geurts, Ernst and Wehenkel 2006, as scikit-learn's `ExtraTreesRegressor`.
    """

    trees: int = 200
    seed: int = 0

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedExtraTrees":
        """Grow the trees."""
        from sklearn.ensemble import ExtraTreesRegressor

        encoding = _encoding(table)
        forest = ExtraTreesRegressor(self.trees, random_state=self.seed)
        return FittedExtraTrees(encoding, forest.fit(encoding.encode(table), y))


@dataclass(frozen=True, eq=False)
class FittedExtraTrees:
    """Trees, and how a table becomes their columns."""

    encoding: "Encoding"
    forest: Any

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The mean over the trees."""
        return np.asarray(self.forest.predict(self.encoding.encode(table)))


@dataclass(frozen=True)
class LightGBM:
    """LightGBM's boosted trees: splits on sets of categories, missing values go where they help.

    The learning rate, depth and number of trees are fixed; a leaf may hold a single model, as in the paper's own LightGBM runs.
    Raises: `UserError` where lightgbm is not installed.
    """

    trees: int = 100
    depth: int = 3
    learning_rate: float = 0.1
    seed: int = 0

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedLightGBM":
        """Grow the trees, the same on every run."""
        if not find_spec("lightgbm"):
            raise UserError('lightgbm is not installed: pip install "scaling-meta[lightgbm]", or choose another model')
        import lightgbm

        options = {
            "objective": "regression", "max_depth": self.depth, "num_leaves": 2**self.depth, "learning_rate": self.learning_rate,
            "min_data_in_leaf": 1, "min_data_per_group": 1, "cat_smooth": 1.0, "seed": self.seed, "num_threads": 1,
            "deterministic": True, "force_row_wise": True, "verbosity": -1,
        }  # fmt: skip
        places = [table.features.index(name) for name in table.categories]
        data = lightgbm.Dataset(table.values, y, categorical_feature=places)
        return FittedLightGBM(table.features, lightgbm.train(options, data, self.trees))


@dataclass(frozen=True, eq=False)
class FittedLightGBM:
    """The trees and the features that they were grown on."""

    features: tuple[str, ...]
    booster: Any

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The sum over the trees."""
        return np.asarray(self.booster.predict(table.select(self.features).values, num_threads=1))


@dataclass(frozen=True, eq=False)
class Encoding:
    """How features become numbers without gaps: `fill` for a missing number, `levels` of each category, columns for what was missing."""

    features: tuple[str, ...]
    fill: dict[str, float]
    levels: dict[str, Float64[np.ndarray, " levels"]]
    indicated: tuple[str, ...]

    def encode(self, table: Table) -> Float64[np.ndarray, "models columns"]:
        """The numbers of a table that has these features."""
        columns = [np.empty((len(table), 0))]
        for name in self.features:
            values = table.column(name)
            if name in self.levels:
                columns.append((values[:, None] == self.levels[name]).astype(np.float64))
            else:
                columns.append(np.where(np.isnan(values), self.fill[name], values)[:, None])
        return np.concatenate([*columns, *(np.isnan(table.column(name))[:, None] for name in self.indicated)], axis=1)


def _encoding(table: Table) -> Encoding:
    """From the training models."""
    known = {name: table.column(name)[~np.isnan(table.column(name))] for name in table.features}
    fill = {name: float(np.median(values)) if len(values) else 0.0 for name, values in known.items()}
    levels = {name: np.unique(known[name]) for name in table.features if name in table.categories}
    return Encoding(table.features, fill, levels, tuple(name for name in table.features if len(known[name]) < len(table)))
