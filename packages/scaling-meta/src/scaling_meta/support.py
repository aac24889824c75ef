"""Support: whether there are models enough like a design to say anything of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.schema import FIELDS
from scaling_meta.table import Table

_NEAR = 0.1  # of the spread of a feature: values this close to a changed one speak for it
_QUANTILE = 0.95


class OutsideSupport(UserError):
    """No answer: too far from every model that was fitted to."""


@dataclass(frozen=True)
class Neighbour:
    """A model and its distance from a design: 0 if alike in all that is known of the design, 1 if at opposite ends in all."""

    model: str
    distance: float


@dataclass(frozen=True, eq=False)
class Support:
    """The designs that were fitted to.

    scaled: their features, numbers divided by the spread (largest minus smallest; logarithms of those that are positive, like widths)
    farthest: the largest distance at which there is still an answer: of 95 % of the models one of another family is nearer
    """

    table: Table
    scaled: Float64[np.ndarray, "models features"]
    low: Float64[np.ndarray, " features"]
    spread: Float64[np.ndarray, " features"]
    farthest: float

    @classmethod
    def of(cls, table: Table) -> "Support":
        """The support of a table. Raises: `UserError` if all models are of one family."""
        families = np.array(table.families, dtype=np.str_)
        if len(set(table.families)) < 2:
            raise UserError(f"{len(table)} models of one family do not tell how far another one may lie: add families")
        logs = _logs(table)
        known = ~np.isnan(logs).all(0)
        low, spread = np.zeros(logs.shape[1]), np.ones(logs.shape[1])
        low[known] = np.nanmin(logs[:, known], axis=0)
        spread[known] = np.nanmax(logs[:, known], axis=0) - low[known]
        spread[spread == 0] = 1.0
        scaled = (logs - low) / spread
        found = cls(table, scaled, low, spread, math.inf)
        others = [found._distances(row)[families != family].min() for row, family in zip(scaled, families, strict=True)]
        return cls(table, scaled, low, spread, float(np.quantile(others, _QUANTILE)))

    def nearest(self, design: Table, count: int = 3) -> list[Neighbour]:
        """The models most like a design (a table of one row), nearest first.

        Gower's distance: the mean over the features known of the design of |difference| / spread, or 0 or 1 for categories. A feature that
        is not known of the model counts one half. Source: Gower 1971.
        """
        distances = self._distances(self._scale(design))
        return [
            Neighbour(self.table.models[row], float(distances[row])) for row in np.argsort(distances, kind="stable")[:count]
        ]

    def problems(self, design: Table, changed: Sequence[str] = ()) -> list[str]:
        """Why there is no answer for a design; nothing if there is one.

        A number lies outside the values of all models, a category was never seen, or the nearest model is farther than `farthest`. Of the
        features that were `changed`, models of at least two families have a value within a tenth of the spread, and one of these models
        is not farther than `farthest`.
        """
        scaled, found = self._scale(design), []
        for name, value, column in zip(self.table.features, scaled, self.scaled.T, strict=True):
            if np.isnan(value):
                continue
            known = column[~np.isnan(column)]
            if name in self.table.categories:
                if value not in known:
                    found.append(f"no model has {name} {self.table.categories[name][int(design.column(name)[0])]}")
            elif not len(known) or not known.min() - 1e-9 <= value <= known.max() + 1e-9:
                found.append(f"{name} {_shown(name, design.column(name)[0])} lies outside {self._range(name)}")
        distances = self._distances(scaled)
        near = np.ones(len(self.table), bool)
        for name in changed:
            place = self.table.features.index(name)
            gap = np.abs(self.scaled[:, place] - scaled[place])
            near &= gap == 0 if name in self.table.categories else gap <= _NEAR
        families = {family for family, one in zip(self.table.families, near, strict=True) if one}
        if not found and len(families) < 2:
            what = f"only {next(iter(families))} has" if families else "no family has"
            found.append(
                f"{what} models with about this {' and '.join(changed)}: it takes two to tell a design from its family"
            )
        if not found and distances[near].min() > self.farthest:
            like = " with about this " + " and ".join(changed) if changed else ""
            row = int(np.where(near, distances, np.inf).argmin())
            found.append(
                f"the nearest model{like}, {self.table.models[row]}, is at distance {distances[row]:.2f}, beyond {self.farthest:.2f}"
            )
        return found

    def check(self, design: Table, changed: Sequence[str] = ()) -> None:
        """Raise `OutsideSupport`, with the reasons and the nearest models, if there is no answer for a design."""
        found = self.problems(design, changed)
        if found:
            near = ", ".join(f"{one.model} ({one.distance:.2f})" for one in self.nearest(design))
            raise OutsideSupport(f"{design.models[0]} lies outside what was fitted to: {'; '.join(found)}. Nearest: {near}")

    def _scale(self, design: Table) -> Float64[np.ndarray, " features"]:
        return ((_logs(design.select(self.table.features)) - self.low) / self.spread)[0]

    def _distances(self, scaled: Float64[np.ndarray, " features"]) -> Float64[np.ndarray, " models"]:
        asked = ~np.isnan(scaled)
        if not asked.any():
            return np.full(len(self.table), math.inf)
        gaps = np.abs(self.scaled[:, asked] - scaled[asked])
        categories = np.array([name in self.table.categories for name in self.table.features])[asked]
        gaps[:, categories] = np.where(gaps[:, categories] > 0, 1.0, gaps[:, categories])
        return np.where(np.isnan(gaps), 0.5, np.minimum(gaps, 1.0)).mean(1)

    def _range(self, name: str) -> str:
        known = self.table.column(name)[~np.isnan(self.table.column(name))]
        return f"{_shown(name, known.min())} to {_shown(name, known.max())}" if len(known) else "what is known of any model"


def _logs(table: Table) -> Float64[np.ndarray, "models features"]:
    """The values, with logarithms of those that are always positive; codes of categories as they are."""
    positive = [name in FIELDS and name not in table.categories and FIELDS[name].low > 0 for name in table.features]
    return np.where(positive, np.log(np.where(positive, table.values, 1.0)), table.values)


def _shown(name: str, value: float) -> str:
    return f"{math.exp(value):.3g} (exp of {name})" if name.startswith("log_") else f"{value:g}"
