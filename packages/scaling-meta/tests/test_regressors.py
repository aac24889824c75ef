"""What each regressor learns, from tables where the truth is known."""

import sys

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.ensembles import ExtraTrees, LightGBM
from scaling_meta.regressors import REGRESSORS, Fitted, Regressor, regressor
from scaling_meta.schema import BENCHMARKS
from scaling_meta.trend import Trend

from .synthetic import code_score, scale_score, table


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_gives_the_same_twice_and_predicts_tables_of_other_rows(name):
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    some, other = table(), table(families=2, siblings=2, seed=5)
    made = regressor(name, BENCHMARKS["gsm8k"])
    assert isinstance(made, Regressor)
    fits = [made.fit(some, code_score(some)) for _ in range(2)]
    assert all(isinstance(one, Fitted) for one in fits)
    first, second = (one.predict(other) for one in fits)
    assert first.shape == (4,)
    assert np.array_equal(first, second)


def test_an_unknown_name_is_refused_and_bounds_are_the_benchmarks():
    with pytest.raises(UserError, match="there is no model ridge: choose one of median"):
        regressor("ridge")
    assert regressor("trend", BENCHMARKS["anli"]).bounds == (0.0, 2.0)


def test_the_baselines_are_the_median_and_least_squares_on_logarithms():
    some = table()
    y = scale_score(some)
    assert set(regressor("median").fit(some, y).predict(some)) == {np.median(y)}
    design = np.column_stack([np.ones(len(some)), some.values[:, :2]])
    known = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert regressor("log-linear").fit(some, y).predict(some) == pytest.approx(known)
    some.values[1, 0] = np.nan
    with pytest.raises(UserError, match="m1: log_params is missing"):
        regressor("log-linear").fit(some, y)


@pytest.mark.parametrize("made", [ExtraTrees(), LightGBM()], ids=["extra-trees", "lightgbm"])
def test_trees_see_categories_and_what_is_missing(made):
    if isinstance(made, LightGBM):
        pytest.importorskip("lightgbm")
    some = table(families=24)
    some.values[::3, 2] = np.nan
    y = 0.3 + 0.2 * some.column("block_type") + 0.3 * np.isnan(some.column("share_code"))
    some.values[1, 3] = np.nan
    known = ~np.isnan(some.column("block_type"))
    assert np.abs(made.fit(some.rows(known), y[known]).predict(some) - y)[known].max() < 0.02


def test_lightgbm_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    monkeypatch.setattr("scaling_meta.ensembles.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "scaling-meta\[lightgbm\]"'):
        LightGBM().fit(table(), scale_score(table()))


def test_the_trend_goes_on_where_trees_are_flat():
    some = table(families=20, siblings=6)
    y, large = scale_score(some), some.flops > np.quantile(some.flops, 0.8)
    errors = {
        name: np.abs(regressor(name).fit(some.rows(~large), y[~large]).predict(some.rows(large)) - y[large]).mean()
        for name in ("trend", "extra-trees", "log-linear")
    }
    assert errors["trend"] < 0.3 * errors["extra-trees"]
    assert errors["trend"] < 0.5 * errors["log-linear"]


def test_the_trend_believes_its_forest_where_features_help_with_unseen_families():
    some = table(families=30, noise=3)
    helped = Trend().fit(some, code_score(some))
    assert helped.weight > 0.6
    law = np.abs(Trend(trees=1, learning_rate=1e-6).fit(some, code_score(some)).predict(some) - code_score(some)).mean()
    fresh = table(families=30, noise=3, seed=9)
    assert np.abs(helped.predict(fresh) - code_score(fresh)).mean() < 0.7 * law


def test_the_trend_ignores_a_forest_that_recognises_families():
    some = table(families=12, noise=5, by_family=True)
    y = np.clip(scale_score(some) + np.repeat(np.random.default_rng(1).normal(0, 0.1, 12), 5), 0, 1)
    assert Trend().fit(some, y).weight < 0.3
    assert Trend().fit(some.rows(np.arange(5)), y[:5]).weight == 0.0
