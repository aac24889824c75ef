"""Intervals calibrated by family cover models of new families; those that count siblings as independent do not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.conformal import Calibrated, weighted_quantile
from scaling_meta.table import Table


@dataclass(frozen=True)
class Nearest:
    """Predicts the score of the most similar model: good at recognising a family, as trees are."""

    def fit(self, table, y):
        return FittedNearest(table.values, y)


@dataclass(frozen=True, eq=False)
class FittedNearest:
    values: np.ndarray
    y: np.ndarray

    def predict(self, table):
        return self.y[np.abs(self.values[:, None] - table.values[None]).sum(2).argmin(0)]


def draw(random, families, siblings):
    """Models whose score is that of their family, which its width tells, and some noise."""
    count = families * siblings
    effect, width = np.repeat(random.normal(0, 1, families), siblings), np.repeat(random.uniform(0, 100, families), siblings)
    values = np.column_stack([width, random.uniform(0, 0.01, count)])
    names = tuple(f"m{row}" for row in range(count))
    table = Table(
        names, ("dimension", "mlp_ratio"), values, {}, tuple(f"f{row // siblings}" for row in range(count)), ("",) * count
    )
    return table, effect + random.normal(0, 0.1, count)


def test_new_families_are_covered_and_siblings_taken_as_independent_mislead():
    random, families, siblings = np.random.default_rng(0), 19, 4
    covered, naive, changes = [], [], []
    for _ in range(60):
        table, y = draw(random, families + 1, siblings)
        rows = np.arange(families * siblings)
        known, new = table.rows(rows), table.rows(np.arange(families * siblings, len(table)))
        truth = y[families * siblings :]
        calibrated = Calibrated.fit(Nearest(), known, y[rows])
        found = calibrated.predict(new, 0.9)
        covered.append(((found.low <= truth) & (truth <= found.high)).mean())
        alone = Calibrated.fit(Nearest(), replace(known, families=known.models), y[rows]).predict(new, 0.9)
        naive.append(((alone.low <= truth) & (truth <= alone.high)).mean())
        first, second = new.rows(np.array([0, 1])), new.rows(np.array([2, 3]))
        change = calibrated.change(first, second, 0.9)
        changes.append(((change.low <= truth[2:] - truth[:2]) & (truth[2:] - truth[:2] <= change.high)).mean())
        assert (change.high - change.low < found.high[:2] - found.low[:2]).all()
    assert np.mean(covered) > 0.86
    assert np.mean(naive) < 0.5
    assert np.mean(changes) > 0.86


def test_a_level_finer_than_the_families_allow_has_no_finite_end():
    table, y = draw(np.random.default_rng(1), 5, 3)
    calibrated = Calibrated.fit(Nearest(), table, y)
    assert calibrated.finest == pytest.approx(5 / 6)
    assert np.isfinite(calibrated.predict(table, 0.8).high).all()
    found = calibrated.predict(table, 0.9)
    assert np.isinf(found.low).all()
    assert np.isinf(found.high).all()
    cut = found.within(-1, 2)
    assert (cut.low[0], cut.high[0], cut.values[0]) == (-1, 2, found.values[0])
    assert "5 families" in calibrated.guarantee(0.8)
    assert "at least 60%" in calibrated.guarantee(0.8)
    assert "above 83.3%" in calibrated.guarantee(0.8)


def test_families_weigh_the_same_whatever_their_size():
    count = 40
    families = tuple(["big"] * 37 + ["b", "c", "d"])
    table = Table(tuple(map(str, range(count))), ("dimension",), np.arange(40.0)[:, None], {}, families, ("",) * count)
    y = np.array([0.0] * 37 + [5.0, 6.0, 7.0])

    @dataclass(frozen=True)
    class Zero:
        def fit(self, table, y):
            return self

        def predict(self, table):
            return np.zeros(len(table))

    assert (
        Calibrated.fit(Zero(), table, y).predict(table.rows(np.array([0])), 0.6).high[0] == 6
    )  # errors 0, 5, 6, 7, infinity: 1/5 each


def test_pairs_of_siblings_calibrate_the_change_and_single_models_have_none():
    table, y = draw(np.random.default_rng(2), 6, 1)
    found = Calibrated.fit(Nearest(), table, y).change(table.rows(np.array([0])), table.rows(np.array([1])), 0.5)
    assert np.isinf(found.high[0])


def test_weighted_quantiles_are_the_smallest_value_that_reaches_the_level():
    values, weights = np.array([2.0, 1.0, 3.0]), np.array([0.2, 0.5, 0.2])
    assert [weighted_quantile(values, weights, level) for level in (0.5, 0.51, 0.7, 0.9, 0.91)] == [1, 2, 2, 3, np.inf]


def test_a_level_is_a_probability():
    table, y = draw(np.random.default_rng(3), 3, 2)
    with pytest.raises(UserError, match="between 0 and 1"):
        Calibrated.fit(Nearest(), table, y).predict(table, 1.0)
