"""Planted effects are found; selection that has seen the test scores shows a gain where there is none."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from xgboost import XGBRegressor

from lmcore.errors import UserError
from scaling_meta.boosting import GRID
from scaling_meta.optimism import honest_gain, published_gain
from scaling_meta.schema import SCALING
from scaling_meta.selection import PUBLISHED, Search, forward, frequencies, nested_errors, select, select_nested, stability
from scaling_meta.splits import family_folds, largest, random_folds

from .synthetic import code_score, scale_score, table

FAST = Search(seeds=3, grid=((2, 0.2, 25),))


def test_the_published_errors_are_those_of_grid_search_of_xgboost():
    some = table(families=20)
    some.values[::7, 2] = np.nan
    features, y = (*SCALING, "share_code"), code_score(table(families=20))
    found = nested_errors(some, y, [features], replace(PUBLISHED, seeds=1))
    grid = {"max_depth": [2, 3, 5], "learning_rate": [0.01, 0.1, 0.3], "n_estimators": [50, 100]}
    assert len(GRID) == 18
    data, known = some.select(features).values, []
    for train, test in [*KFold(3, shuffle=True, random_state=0).split(data)][:1]:
        train, _ = train_test_split(train, test_size=0.2, random_state=0)
        inner = KFold(3, shuffle=True, random_state=0)
        search = GridSearchCV(XGBRegressor(n_jobs=1), grid, cv=inner, scoring="neg_mean_absolute_error").fit(
            data[train], y[train]
        )
        known.append(np.abs(search.predict(data[test]) - y[test]).mean())
    assert found[0, 0, :1] == pytest.approx(known, abs=1e-5)


def test_all_sets_are_fitted_as_each_alone():
    some = table()
    sets = [SCALING, (*SCALING, "share_code"), ("block_type",)]
    search = Search(seeds=2, grid=((2, 0.1, 20), (3, 0.3, 10), (2, 0.1, 10)))
    together = nested_errors(some, code_score(some), sets, search)
    assert together.shape == (3, 2, 3)
    for one, errors in zip(sets, together, strict=True):
        assert np.array_equal(nested_errors(some, code_score(some), [one], search)[0], errors)


def test_forward_takes_the_best_while_it_helps():
    errors = {(): 1.0, ("a",): 0.5, ("b",): 0.4, ("c",): 0.9, ("b", "a"): 0.39, ("b", "c"): 0.39995}
    found = forward(lambda sets: np.array([errors.get(one, 0.39) for one in sets]), ["a", "b", "c"], (), tolerance=1e-4)
    assert found.features == ("b", "a")
    assert [(step.feature, step.before, step.after) for step in found.steps[1:]] == [("a", 0.4, 0.39)]


def test_the_planted_code_share_is_chosen_first_and_helps_honestly():
    some = table(families=16, noise=6)
    y = code_score(some) + np.random.default_rng(1).normal(0, 0.01, len(some))
    nested = select_nested(some, y, random_folds(len(some)), FAST)
    assert all(one.steps[0].feature == "share_code" for one in nested.selections)
    gain = honest_gain(nested)
    assert gain.gain.value > 0.25
    assert gain.gain.interval[0] > 0
    assert gain.family.p < 0.01
    by_family = honest_gain(select_nested(some, y, family_folds(some.families)[:6], FAST))
    assert by_family.gain.value > 0.2


def test_noise_is_chosen_from_halves_no_more_often_than_chance_and_the_planted_feature_always():
    some = table(families=24, noise=6)
    y = code_score(some) + np.random.default_rng(1).normal(0, 0.01, len(some))
    found = stability(some, y, FAST, resamples=8)
    assert next(iter(found)) == "share_code"
    assert found["share_code"] == 1.0
    assert SCALING[0] not in found
    noise = np.array([share for name, share in found.items() if name.startswith("noise")])
    assert noise.mean() < 0.35


def test_selection_that_has_seen_the_test_scores_gains_by_noise_and_the_leak_free_one_does_not():
    """Purpose-built leak: 60 columns of noise. What is gained on the models that were selected on is not gained on others."""
    some = table(families=8, noise=60, seed=2)
    y = scale_score(some) + np.random.default_rng(12).normal(0, 0.15, len(some))
    leaky = published_gain(some, y, select(some, y, FAST), seeds=10, search=FAST)
    honest = honest_gain(select_nested(some, y, random_folds(len(some), seeds=(0, 1)), FAST))
    assert leaky.gain.value > 0.08
    assert leaky.naive.p < 0.001  # the paper's test, fooled
    assert leaky.corrected.p > 0.05
    assert honest.gain.value < 0
    assert honest.family.p > 0.05


def test_noise_that_tells_families_apart_gains_in_random_folds_and_not_in_unseen_families():
    """Purpose-built leak: columns of noise that are alike in a family, and scores that depend on the family."""
    some = table(families=12, noise=8, by_family=True)
    y = np.clip(scale_score(some) + np.repeat(np.random.default_rng(5).normal(0, 0.1, 12), 5), 0, 1)
    at_random = honest_gain(select_nested(some, y, random_folds(len(some)), FAST))
    unseen = honest_gain(select_nested(some, y, family_folds(some.families), FAST))
    assert at_random.gain.value > 0.2
    assert unseen.gain.value < 0.5 * at_random.gain.value
    assert unseen.family.p > 0.05


def test_scores_of_test_models_change_neither_choice_nor_prediction():
    some = table(families=10, noise=3)
    y = code_score(some)
    splits = largest(some.flops, 10)
    changed = y.copy()
    changed[splits[0].test] = np.random.default_rng(0).uniform(size=10)
    first, second = (select_nested(some, scores, splits, FAST) for scores in (y, changed))
    assert first.selections == second.selections
    assert np.array_equal(first.selected.predictions, second.selected.predictions, equal_nan=True)


def test_frequencies_count_selections():
    some = forward(lambda sets: np.array([1.0 - len(one) for one in sets]), ["a"], ())
    none = forward(lambda sets: np.ones(len(sets)), ["a"], ("b",))
    assert frequencies([some, none], ["b", "a", "c"]) == {"b": 0.5, "a": 0.5, "c": 0.0}


def test_what_cannot_be_searched_is_refused():
    some = table(families=2)
    with pytest.raises(UserError, match="10 models of 2 families cannot be divided into 3 folds"):
        select(some, scale_score(some), replace(FAST, by_family=True))
    with pytest.raises(UserError, match="2 models with a score cannot be divided into 3 folds"):
        select(some.rows(np.arange(2)), np.zeros(2), FAST)
    with pytest.raises(UserError, match="the table has no feature log_tokens"):
        select(some.select(["log_params", "share_code"]), scale_score(some), FAST)


def test_folds_of_families_hold_families_out():
    some = table(families=12, noise=8, by_family=True)
    y = np.clip(scale_score(some) + np.repeat(np.random.default_rng(5).normal(0, 0.1, 12), 5), 0, 1)
    noise = [name for name in some.features if name.startswith("noise")]
    sets, gains = [SCALING, (*SCALING, *noise)], []
    for by_family in (False, True):
        before, after = nested_errors(some, y, sets, replace(FAST, by_family=by_family)).mean((1, 2))
        gains.append(1 - after / before)
    assert gains[0] > 0.2
    assert gains[1] < 0.15
