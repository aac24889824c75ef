"""Effect curves: how the predicted score goes with one feature, each range with the models and families that stand behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from lmcore.errors import UserError
from scaling_meta.bootstrap import Draws, estimate
from scaling_meta.inference import Estimate
from scaling_meta.ops.bins import binned
from scaling_meta.ops.forests import Forests
from scaling_meta.schema import DATA
from scaling_meta.shap import Attribution, weighted_mean
from scaling_meta.table import Table

Range = tuple[float, float] | str
"""Values from the first number up to, but not including, the second; or the name of a category."""

SHARE_EDGES = (0.0, 5.0, 10.0, 15.0, 25.0, 50.0, 100.0)
"""Ends of the ranges of a share in percent, with the 15 to 25 % of the paper among them."""

Evidence = Literal["none", "weak", "fair"]
"""Weak below 5 models or 3 families: a range can then not be told from the few families that have it."""

_FEW_MODELS, _FEW_FAMILIES = 5, 3
_STEPS = 30


@dataclass(frozen=True)
class Effect:
    """The mean effect of one range of a feature, in units of the score, its interval over resampled families, and what it rests on."""

    name: str
    effect: Estimate
    models: int
    families: tuple[str, ...]
    support: Evidence


@dataclass(frozen=True)
class Contrast:
    """The mean effect of the range `above` minus that of `below`; `support` is the weaker of the two sides'."""

    feature: str
    below: Effect
    above: Effect
    difference: Estimate
    support: Evidence


@dataclass(frozen=True, eq=False)
class Effects:
    """The effect of a feature on each model, in the fit to the data (row 0 of `draws`) and to each draw of a family bootstrap.

    Intervals are of what such trees find. Trees round off a peak: where a planted effect has a sharp one, 95 % intervals from SHAP values
    held the truth in 75 to 85 % of all ranges, those of accumulated local effects in 95 to 100 %.
    """

    table: Table
    draws: Draws
    feature: str
    values: Float64[np.ndarray, "draws models"]

    def curve(self, edges: Sequence[float] | None = None, level: float = 0.95) -> list[Effect]:
        """The mean effect in each range of the feature (see `ranges`). Ranges without a model are kept, their effect NaN."""
        return [self._of(one, level) for one in ranges(self.table, self.feature, edges)]

    def contrast(self, below: Range, above: Range, level: float = 0.95) -> Contrast:
        """How much higher the mean effect is in one range than in another."""
        low, high, difference = self._of(below, level), self._of(above, level), self._mean(above) - self._mean(below)
        support = min((low.support, high.support), key=("none", "weak", "fair").index)
        return Contrast(self.feature, low, high, estimate(difference, level), support)

    def _mean(self, one: Range) -> Float64[np.ndarray, " draws"]:
        among = within(self.table, self.feature, one)
        return weighted_mean(self.values[:, among], self.draws[:, among])

    def _of(self, one: Range, level: float) -> Effect:
        family_of = [
            family for family, inside in zip(self.table.families, within(self.table, self.feature, one), strict=True) if inside
        ]
        families = tuple(sorted(set(family_of)))
        weak = len(family_of) < _FEW_MODELS or len(families) < _FEW_FAMILIES
        name = one if isinstance(one, str) else f"{one[0]:g} to {one[1]:g}"
        support: Evidence = "none" if not family_of else "weak" if weak else "fair"
        return Effect(name, estimate(self._mean(one), level), len(family_of), families, support)


def shap_effects(attribution: Attribution, feature: str) -> Effects:
    """The SHAP values of a feature."""
    return Effects(attribution.table, attribution.draws, feature, attribution.of([feature]))


def local_effects(table: Table, forests: Forests, draws: Draws, feature: str) -> Effects:
    """The accumulated local effects (ALE) of a number, at each model's value of it; `forests` are of `shap.fit`. NaN where it is unknown.

    The known values are divided at quantiles z_0 < z_1 < ..., and the effect rises from z_(k-1) to z_k by the mean, over the models in
    between, of f(z_k, others) - f(z_(k-1), others), the others as they are in the model: no design is asked for that is unlike all others.
    In between the effect is linear; its mean over the models is 0.

    Raises: `UserError` for a category, whose values have no order, and for a feature that no model has.
    Source: Apley and Zhu 2020, equations 7 and 8.
    """
    if feature in table.categories:
        raise UserError(f"{feature} is a category: accumulated local effects need an order, its SHAP values do not")
    known = ~np.isnan(table.column(feature))
    if not known.any():
        raise UserError(f"no model of the table has {feature}")
    some, weights, bins = table.rows(known), draws[:, known], binned(table.values)
    column, place = some.column(feature), table.features.index(feature)
    ends = np.unique(np.quantile(column, np.linspace(0, 1, _STEPS + 1), method="nearest"))
    step = np.maximum(np.searchsorted(ends, column), 1)  # of each model, the place of the end above it
    rises = np.zeros((len(draws), len(some)))
    if len(ends) > 1:
        for sign, at in ((1, ends[step]), (-1, ends[step - 1])):
            moved = some.values.copy()
            moved[:, place] = at
            rises += sign * forests.predict(bins.encode(moved)).astype(np.float64)
    steps = [weighted_mean(rises[:, step == number], weights[:, step == number]) for number in range(1, len(ends))]
    sums = np.cumsum(np.stack([np.zeros(len(draws)), *steps], axis=1), axis=1)
    values = np.full(draws.shape, np.nan)
    values[:, known] = np.stack([np.interp(column, ends, one) for one in sums])
    values -= weighted_mean(values[:, known], weights)[:, None]
    return Effects(table, draws, feature, values)


def ranges(table: Table, feature: str, edges: Sequence[float] | None = None) -> list[Range]:
    """The categories of a feature, or the ranges between `edges` (see `default_edges`)."""
    if feature in table.categories:
        return [*table.categories[feature]]
    ends = edges if edges is not None else default_edges(table, feature)
    return [*pairwise(ends)]


def default_edges(table: Table, feature: str, count: int = 6) -> tuple[float, ...]:
    """`SHARE_EDGES` of a share in percent, else quantiles that divide the models into `count` parts as well as equal values allow."""
    if feature in DATA:
        return SHARE_EDGES
    column = table.column(feature)
    known = column[~np.isnan(column)]
    return tuple(np.unique(np.quantile(known, np.linspace(0, 1, count + 1), method="nearest")).tolist()) if len(known) else ()


def within(table: Table, feature: str, one: Range) -> Bool[np.ndarray, " models"]:
    """Which models are in a range; the largest value of a feature belongs to the range that ends with it."""
    column = table.column(feature)
    if isinstance(one, str):
        if one not in table.categories.get(feature, ()):
            raise UserError(f"{one} is no category of {feature}: they are {', '.join(table.categories.get(feature, ()))}")
        return column == table.categories[feature].index(one)
    last = np.nanmax(column) if not np.isnan(column).all() else np.nan
    return (column >= one[0]) & ((column < one[1]) | ((column == one[1]) & (one[1] >= last)))
