"""SHAP values of boosted trees: how much each feature of a design moved its predicted score, exactly, with refits to resampled families.

They say what the fitted trees do, not what would happen: features that come together (a family's width, data and positions) share the
credit as the trees happened to split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from lmcore.errors import UserError
from scaling_meta.bootstrap import Draws, estimate
from scaling_meta.inference import Estimate
from scaling_meta.ops.bins import binned
from scaling_meta.ops.forests import Forests, boost
from scaling_meta.schema import ARCHITECTURE, BENCHMARKS, DATA, GENERATION, SCALING
from scaling_meta.splits import Split
from scaling_meta.table import Table

Setting = tuple[int, float, int]
"""Depth, learning rate and number of trees."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "scaling": SCALING,
    "architecture": ARCHITECTURE,
    "data": DATA,
    "generation": GENERATION,
}
"""The groups of features."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """SHAP values of the models of a table: `base + values.sum(-1)` is what was predicted.

    draws: how often each model was in the data of a fit; row 0 is the data themselves, the others are a bootstrap's
    values: of each draw, model and feature, in units of the score
    base: what the trees predict on average over their training models
    """

    table: Table
    draws: Draws
    values: Float64[np.ndarray, "draws models features"]
    base: Float64[np.ndarray, "draws models"]

    def of(self, features: Sequence[str]) -> Float64[np.ndarray, "draws models"]:
        """The SHAP values of some features together, which is their sum."""
        return self.values[:, :, [self.table.features.index(name) for name in features]].sum(2)

    def importance(self, features: Sequence[str], level: float = 0.95) -> Estimate:
        """Mean |SHAP| over the models: how much these features, together, move a prediction. Even a useless feature moves it somewhat."""
        return estimate(self.mean(np.abs(self.of(features))), level)

    def mean(
        self, values: Float64[np.ndarray, "draws models"], among: Bool[np.ndarray, " models"] | None = None
    ) -> Float64[np.ndarray, " draws"]:
        """Mean over the models `among` which, by default all, each counted as often as it was drawn.

        Where a draw has none of them, each counts once: the mean is then over models that the fit has not seen. NaN if `among` is empty.
        """
        some = np.ones(len(self.table), bool) if among is None else among
        return weighted_mean(values[:, some], self.draws[:, some])


def explain(
    table: Table,
    y: Float64[np.ndarray, " models"],
    draws: Draws,
    *,
    splits: Sequence[Split] = (),
    setting: Setting = (3, 0.1, 100),
) -> Attribution:
    """SHAP values of boosted trees, for each of `draws` (see `bootstrap.family_draws`).

    With `splits`, those of models that the trees have not seen: each test model is explained by the trees of its training set, and averaged
    over the repeats (the paper concatenates the outer folds). Without, all models are explained by trees fitted to all of them.

    >>> table = Table(tuple("abcd"), ("log_params",), np.array([[1.0], [2.0], [3.0], [4.0]]), {}, tuple("AABB"), ("",) * 4)
    >>> found = explain(table, np.array([0.1, 0.1, 0.5, 0.5]), np.ones((1, 4), np.uint8), setting=(1, 1.0, 50))
    >>> found.base[0].round(2), found.values[0, :, 0].round(2)
    (array([0.3, 0.3, 0.3, 0.3]), array([-0.2, -0.2,  0.2,  0.2]))

    Raises: `UserError` if a score is missing, a model is never tested, or a draw has no model in a training set.
    Source: path-dependent TreeSHAP, Lundberg et al. 2020, algorithm 2.
    """
    bins, rows = binned(table.values), len(table)
    values, tested = np.zeros((len(draws), rows, len(table.features) + 1)), np.zeros(rows)
    for split in splits or [Split(np.arange(rows), np.arange(rows), "")]:
        trained = np.zeros_like(draws)
        trained[:, split.train] = draws[:, split.train]
        if not trained.any(1).all():
            raise UserError(f"a bootstrap draw has no model to train on where {split.held_out} is held out: add families")
        forests = fit(table, y, trained, setting)
        values[:, split.test] += forests.shap(bins.codes[split.test])
        tested[split.test] += 1
    if not tested.all():
        raise UserError(f"{table.models[int(tested.argmin())]} is in no test set: leave it out of the table")
    values /= tested[:, None]
    return Attribution(table, draws, values[:, :, :-1], values[:, :, -1])


def fit(table: Table, y: Float64[np.ndarray, " models"], draws: Draws, setting: Setting = (3, 0.1, 100)) -> Forests:
    """Fit boosted trees to each draw. Raises: `UserError` if a score is missing."""
    if np.isnan(y).any():
        raise UserError(f"{table.models[int(np.isnan(y).argmax())]} has no score: leave it out")
    depth, rate, trees = setting
    columns = np.ones((len(draws), len(table.features)), bool)
    return boost(binned(table.values), y[None], draws, columns, depth=depth, learning_rate=rate, trees=trees)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Pearson correlation of tasks, in an order in which similar ones are neighbours; `merges` as scipy's linkage, for a dendrogram."""

    tasks: tuple[str, ...]
    correlation: Float64[np.ndarray, "tasks tasks"]
    merges: Float64[np.ndarray, "merges 4"]


def task_similarity(attributions: Mapping[str, Attribution], groups: Sequence[str] = ("architecture", "data")) -> Similarity:
    """How alike tasks respond to the design: the correlation of their SHAP values over common models and the features of `groups`.

    Without those of scale, which all tasks follow. Values of benchmarks where lower is better are negated. Tasks are clustered by
    1 - correlation, average linkage. Raises: `UserError` for fewer than two tasks or two common models.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    common = set.intersection(*(set(one.table.models) for one in attributions.values())) if attributions else set()
    if len(attributions) < 2 or len(common) < 2:
        raise UserError(
            f"{len(attributions)} tasks with {len(common)} models in common cannot be compared: it takes two of each"
        )
    features = [name for group in groups for name in GROUPS[group]]
    profiles = []
    for task, one in attributions.items():
        rows = [one.table.models.index(model) for model in sorted(common)]
        places = [one.table.features.index(name) for name in features if name in one.table.features]
        sign = -1 if task in BENCHMARKS and BENCHMARKS[task].better == "lower" else 1
        profiles.append(sign * one.values[0][np.ix_(rows, places)].ravel())
    correlation = np.corrcoef(profiles).clip(-1, 1)
    merges = linkage(squareform(1 - correlation, checks=False), "average")
    order = leaves_list(merges)
    return Similarity(tuple(np.array([*attributions])[order].tolist()), correlation[np.ix_(order, order)], merges)


def weighted_mean(values: Float64[np.ndarray, "draws some"], weights: Draws) -> Float64[np.ndarray, " draws"]:
    """Of each draw, the mean of the values by weights; the plain mean where all weights are 0; NaN of no values."""
    if values.shape[1] == 0:
        return np.full(len(values), np.nan)
    some = np.where(weights.any(1, keepdims=True), weights, 1).astype(np.float64)
    return (values * some).sum(1) / some.sum(1)
