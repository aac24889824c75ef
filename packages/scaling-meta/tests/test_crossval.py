"""Nothing of a test model reaches its prediction; families are what random folds hide."""

from dataclasses import dataclass

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.crossval import cross_validate
from scaling_meta.ensembles import ExtraTrees
from scaling_meta.regressors import LogLinear, Median
from scaling_meta.splits import SPLITS, Split, family_folds, random_folds

from .synthetic import scale_score, table


@dataclass(frozen=True)
class Recorder:
    """Remembers what it was fitted to, and predicts NaN for models that it has seen."""

    def fit(self, table, y):
        return Seen({*table.models})


@dataclass(frozen=True)
class Seen:
    models: set

    def predict(self, table):
        return np.array([np.nan if name in self.models else 1.0 for name in table.models])


@pytest.mark.parametrize("split", SPLITS)
def test_a_prediction_is_by_a_fit_without_the_model(split):
    some = table()
    splits = SPLITS[split](some, (0, 1))
    found = cross_validate(some, np.zeros(len(some)), Recorder(), splits)
    for one in splits:
        assert (found.predictions[one.repeat, one.test] == 1.0).all()
    assert np.isnan(found.predictions).sum() == found.predictions.size - sum(len(one.test) for one in splits)


def test_errors_by_fold_and_by_model_are_those_of_the_predictions():
    some = table(families=3, siblings=2)
    y = np.array([0.0, 1, 2, 3, 4, 5])
    splits = (Split(np.array([0, 1, 2]), np.array([3, 4]), "a"), Split(np.array([3, 4, 5]), np.array([0, 4]), "b", 1))
    found = cross_validate(some, y, Median(), splits)  # predicts 1, then 4
    assert found.fold_errors.tolist() == [2.5, 2.0]
    assert found.model_errors == pytest.approx([4, np.nan, np.nan, 2, 1.5, np.nan], nan_ok=True)
    assert found.metrics()["mae"] == pytest.approx((2.5 + 2.0) / 2)
    assert (found.train, found.test) == (3.0, 2.0)


def test_clear_decisions_are_those_beyond_the_standard_errors():
    some = table(families=4, siblings=4)
    y = some.flops / 100
    y[0] += 1e-3
    found = cross_validate(some, y, LogLinear(), family_folds(some.families))
    assert "clear_decision_accuracy" not in found.metrics()
    clear = found.metrics(np.full(16, 2e-3))
    assert clear["clear_decision_accuracy"] >= clear["decision_accuracy"] > 0.95


def test_a_family_that_determines_the_score_is_recognised_in_random_folds_and_not_when_held_out():
    some = table(families=15, siblings=6, noise=4, by_family=True)
    y = np.repeat(np.random.default_rng(1).uniform(0.2, 0.8, 15), 6)
    errors = [
        cross_validate(some, y, ExtraTrees(trees=30), splits).metrics()["mae"]
        for splits in (random_folds(len(some)), family_folds(some.families))
    ]
    assert errors[0] < 0.4 * errors[1]
    assert errors[1] > 0.8 * np.abs(y - np.median(y)).mean()


def test_the_interval_is_over_families():
    some = table(families=20, siblings=5)
    y = scale_score(some) + np.repeat(np.random.default_rng(0).normal(0, 0.1, 20), 5)
    found = cross_validate(some, y, LogLinear(), random_folds(len(some), seeds=(0, 1)))
    estimate = found.interval("mae")
    low, high, level = estimate.interval
    assert estimate.value == found.metrics()["mae"]
    assert low < estimate.value < high
    assert level == 0.95
    errors = found.model_errors.reshape(20, 5).mean(1)  # of each family
    assert high - low == pytest.approx(2 * 1.96 * errors.std() / np.sqrt(20), rel=0.25)
    assert found.interval("spearman", resamples=20).interval[1] <= 1.0


def test_a_missing_score_is_named():
    some = table()
    y = scale_score(some)
    y[2] = np.nan
    with pytest.raises(UserError, match="m2 has no score"):
        cross_validate(some, y, Median(), random_folds(len(some)))
