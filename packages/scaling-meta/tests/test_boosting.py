import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.boosting import GRID, Boosted
from scaling_meta.database import Database
from scaling_meta.splits import random_folds
from scaling_meta.table import Table

ONE = ((3, 0.1, 100),)


@pytest.fixture(scope="module")
def shipped():
    database = Database.shipped()
    table = database.table(("log_params", "log_tokens", "share_code", "activation", "sequence_length"))
    return table, database.scores("lambada", table.models).values


def test_the_search_finds_what_gridsearchcv_of_xgboost_finds(shipped):
    from sklearn.model_selection import GridSearchCV, KFold
    from xgboost import XGBRegressor

    table, y = shipped
    for seed in (0, 1):
        some = random_folds(len(table), seeds=(seed,))[0]
        options = {"max_depth": [2, 3, 5], "learning_rate": [0.01, 0.1, 0.3], "n_estimators": [50, 100]}
        search = GridSearchCV(
            XGBRegressor(tree_method="hist", n_jobs=1), options, scoring="neg_mean_absolute_error",
            cv=KFold(3, shuffle=True, random_state=seed),
        ).fit(table.values[some.train], y[some.train])  # fmt: skip
        fitted = Boosted(seed=seed).fit(table.rows(some.train), y[some.train])
        best = search.best_params_
        assert fitted.setting == (best["max_depth"], best["learning_rate"], best["n_estimators"])
        np.testing.assert_allclose(fitted.predict(table.rows(some.test)), search.predict(table.values[some.test]), atol=1e-5)


def test_a_grid_of_one_is_fitted_as_it_is_even_to_two_models(shipped):
    table, y = shipped
    fitted = Boosted(grid=ONE).fit(table.rows(np.array([0, 50])), y[[0, 50]])
    assert fitted.setting == ONE[0]
    with pytest.raises(UserError, match="2 models with a score cannot be divided into 3 folds"):
        Boosted().fit(table.rows(np.array([0, 50])), y[[0, 50]])


def test_equal_settings_give_the_first():
    table = Table(tuple("abcdef"), ("log_params",), np.zeros((6, 1)), {}, tuple("abcdef"), ("",) * 6)
    assert Boosted().fit(table, np.full(6, 0.5)).setting == GRID[0]


def categories(codes):
    names = tuple(map(str, range(len(codes))))
    return Table(
        names,
        ("activation",),
        np.array(codes, float)[:, None],
        {"activation": ("gelu", "relu", "silu")},
        names,
        ("",) * len(codes),
    )


def test_native_categories_can_be_parted_in_any_way():
    """Relu, the middle code, is the odd one out: one cut on codes cannot part it from both others."""
    codes = [0, 1, 2] * 20
    table, y = categories(codes), np.array([0.0, 1.0, 0.0] * 20)
    grid = ((1, 1.0, 1),)
    native, ordered = (
        Boosted(grid=grid, native=native).fit(table, y).predict(categories([0, 1, 2])) for native in (True, False)
    )
    np.testing.assert_allclose(native, [0, 1, 0], atol=0.06)  # the leaf is shrunk by l2 / (count + l2)
    assert np.abs(ordered - [0, 1, 0]).max() > 0.4


def test_a_missing_category_is_no_category():
    table, y = categories([0, 1, np.nan] * 20), np.array([0.0, 0.0, 1.0] * 20)
    for native in (True, False):
        fitted = Boosted(grid=((2, 0.5, 50),), native=native).fit(table, y)
        np.testing.assert_allclose(fitted.predict(categories([0, 1, np.nan])), [0, 0, 1], atol=0.02)


def test_predictions_need_the_features_of_the_fit(shipped):
    table, y = shipped
    fitted = Boosted(grid=ONE).fit(table, y)
    moved = table.select(table.features[::-1])
    np.testing.assert_array_equal(fitted.predict(moved), fitted.predict(table))
    with pytest.raises(UserError, match="share_code"):
        fitted.predict(table.select(["log_params", "log_tokens"]))
