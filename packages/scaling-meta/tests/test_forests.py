from dataclasses import astuple

import numpy as np
import pytest

from scaling_meta.ops.bins import MISSING, binned
from scaling_meta.ops.forests import boost, held_out_errors


def world(rows, features, *, missing=0.2, distinct=0, seed=0):
    """Values, continuous or with ties, with holes; and labels that depend on them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, features))
    if distinct:
        values = np.round(values * distinct) / distinct
    y = np.tanh(values[:, 0]) + 0.3 * values[:, -1] * (values[:, 0] > 0) + 0.1 * generator.normal(size=rows)
    values[generator.random(values.shape) < missing] = np.nan
    return values, y


def masks(rows, features, models, seed=1):
    generator = np.random.default_rng(seed)
    some, columns = generator.random((models, rows)) < 0.7, generator.random((models, features)) < 0.7
    some[:, 0] = columns[:, 0] = True
    return some, columns


def theirs(values, y, train, columns, *, depth, rate, trees):
    """What xgboost predicts for all rows, fitted to some rows and columns."""
    import xgboost

    options = {"tree_method": "hist", "max_depth": depth, "eta": rate, "nthread": 1}
    booster = xgboost.train(options, xgboost.DMatrix(values[train][:, columns], y[train]), trees)
    return booster.predict(xgboost.DMatrix(values[:, columns]))


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(("missing", "distinct"), [(0.0, 0), (0.3, 0), (0.3, 2)])
def test_predictions_are_those_of_xgboost_on_trained_and_held_out_rows(depth, rate, missing, distinct):
    values, y = world(92, 10, missing=missing, distinct=distinct)
    some, columns = masks(92, 10, 3)
    forests = boost(binned(values), y[None], some, columns, depth=depth, learning_rate=rate, trees=100)
    found = forests.predict(binned(values).codes)
    for model in range(3):
        for trees in (50, 100):
            expected = theirs(values, y, some[model], columns[model], depth=depth, rate=rate, trees=trees)
            np.testing.assert_allclose(forests.predict(binned(values).codes, trees)[model], expected, atol=1e-5)
    assert found.shape == (3, 92)


@pytest.mark.parametrize(("rows", "features", "depth"), [(1, 1, 2), (2, 3, 3), (63, 5, 3), (40, 4, 5)])
def test_kernel_grows_the_trees_of_the_reference(rows, features, depth, monkeypatch):
    values, y = world(rows, features, distinct=3)
    bins, (some, columns) = binned(values), masks(rows, features, 4)
    found = {}
    for backend in ("reference", "numba"):
        monkeypatch.setenv("LMCORE_BACKEND", backend)
        found[backend] = boost(bins, y[None], some, columns, depth=depth, learning_rate=0.3, trees=12)
    for ours, oracle in zip(astuple(found["numba"]), astuple(found["reference"]), strict=True):
        np.testing.assert_array_equal(ours, oracle)


def test_each_model_has_its_own_depth_rate_and_target():
    values, y = world(50, 4)
    bins, (some, columns) = binned(values), masks(50, 4, 4)
    targets = np.stack([y, -2 * y])
    depth, rate, target = np.array([2, 3, 2, 5]), np.array([0.1, 0.3, 0.1, 0.01]), np.array([0, 0, 1, 1])
    together = boost(bins, targets, some, columns, target, depth=depth, learning_rate=rate, trees=20).predict(bins.codes)
    for model in range(4):
        alone = boost(
            bins, targets[target[model]][None], some[[model]], columns[[model]], depth=int(depth[model]),
            learning_rate=float(rate[model]), trees=20,
        )  # fmt: skip
        np.testing.assert_array_equal(alone.predict(bins.codes)[0], together[model])


def test_a_row_that_counts_twice_is_a_row_that_is_there_twice():
    values, y = world(30, 3, missing=0.0)
    twice = np.concatenate([values, values[:10]])
    weight = np.r_[np.full(10, 2), np.ones(20)].astype(np.uint8)[None]
    columns = np.ones((1, 3), bool)
    counted = boost(binned(values), y[None], weight, columns, trees=10).predict(binned(values).codes)
    repeated = boost(binned(twice), np.r_[y, y[:10]][None], np.ones((1, 40), bool), columns, trees=10).predict(
        binned(twice).codes
    )
    np.testing.assert_allclose(counted[0], repeated[0, :30], atol=1e-5)


def test_held_out_errors_are_those_of_the_predictions():
    values, y = world(60, 5)
    bins, (some, columns) = binned(values), masks(60, 5, 6)
    found = held_out_errors(bins, y[None], some, ~some, columns, depth=3, learning_rate=0.1, prefixes=(20, 50))
    forests = boost(bins, y[None], some, columns, depth=3, learning_rate=0.1, trees=50)
    for number, trees in enumerate((20, 50)):
        misses = np.abs(forests.predict(bins.codes, trees) - y)
        np.testing.assert_allclose(found[:, number], [misses[m][~some[m]].mean() for m in range(6)], atol=1e-6)


def test_new_rows_go_where_xgboost_sends_them():
    values, y = world(60, 4)
    new = world(200, 4, seed=5)[0] * 2
    bins, every = binned(values), (np.ones((1, 60), bool), np.ones((1, 4), bool))
    forests = boost(bins, y[None], *every, depth=3, learning_rate=0.1, trees=50)
    import xgboost

    booster = xgboost.train({"tree_method": "hist", "max_depth": 3, "eta": 0.1}, xgboost.DMatrix(values, y), 50)
    inside = (new <= np.nanmax(values, 0)) | np.isnan(new)
    rows = inside.all(1)  # beyond the largest training value xgboost sends a row where it sends missing values
    assert rows.sum() > 30
    np.testing.assert_allclose(
        forests.predict(bins.encode(new))[0][rows], booster.predict(xgboost.DMatrix(new))[rows], atol=1e-5
    )


def test_codes_are_ranks_and_holes():
    assert binned(np.array([[3.0], [np.nan], [-1.0], [3.0]])).codes.ravel().tolist() == [1, MISSING, 0, 1]
    with pytest.raises(ValueError, match="row 1, feature 0 holds inf"):
        binned(np.array([[1.0], [np.inf]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((2, 5), bool)}, "model 0 has no row"),
        ({"columns": np.zeros((2, 3), bool)}, "model 0 has no feature"),
        ({"columns": np.ones((2, 4), bool)}, "columns has shape"),
        ({"y": np.full((1, 5), np.nan)}, "is nan, but row"),
        ({"depth": 0}, "depth goes from 0"),
        ({"target": np.array([0, 1])}, "target goes from 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    options = {"y": np.zeros((1, 5)), "rows": np.ones((2, 5), bool), "columns": np.ones((2, 3), bool), "depth": 2} | change
    with pytest.raises(ValueError, match=message):
        boost(binned(world(5, 3)[0]), **options)
