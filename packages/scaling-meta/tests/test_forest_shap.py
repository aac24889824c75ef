import numpy as np
import pytest

from scaling_meta.ops.bins import binned
from scaling_meta.ops.forest_shap import numba, reference
from scaling_meta.ops.forests import boost


def fitted(rows, features, *, models=3, depth=3, trees=5, seed=0):
    """Forests on values with ties and holes, each on other rows and features."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 6, (rows, features)).astype(float)
    values[generator.random(values.shape) < 0.2] = np.nan
    bins, y = binned(values), generator.normal(size=(1, rows))
    some = generator.random((models, rows)) < 0.8
    some[:, 0] = True
    columns = generator.random((models, features)) < 0.7
    columns[:, 0] = True
    return values, y[0], bins, boost(bins, y, some, columns, depth=depth, learning_rate=0.3, trees=trees)


def arrays(forests):
    return forests.base, forests.feature, forests.threshold, forests.missing_left, forests.value, forests.cover


@pytest.mark.parametrize(("rows", "features", "depth"), [(1, 1, 1), (7, 2, 2), (63, 5, 3), (31, 4, 5)])
def test_kernel_gives_the_definition(rows, features, depth):
    _, _, bins, forests = fitted(rows, features, depth=depth)
    some = bins.codes[: min(rows, 9)]
    np.testing.assert_allclose(
        numba.forest_shap(some, *arrays(forests)), reference.forest_shap(some, *arrays(forests)), atol=2e-6
    )


def test_values_add_up_to_the_prediction_and_features_that_are_not_used_add_nothing():
    _, _, bins, forests = fitted(92, 12, trees=100)
    found = forests.shap(bins.codes)
    np.testing.assert_allclose(found.sum(-1), forests.predict(bins.codes), atol=1e-5)
    for model in range(3):
        unused = [feature for feature in range(12) if not (forests.feature[model] == feature).any()]
        assert unused
        assert not found[model][:, unused].any()


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_values_are_those_of_xgboost(depth):
    import xgboost

    values, y, bins, _ = fitted(92, 8, depth=depth)
    every = np.ones((1, 92), bool), np.ones((1, 8), bool)
    forests = boost(bins, y[None], *every, depth=depth, learning_rate=0.1, trees=100)
    options = {"tree_method": "hist", "max_depth": depth, "eta": 0.1, "nthread": 1}
    matrix = xgboost.DMatrix(values, y)
    theirs = xgboost.train(options, matrix, 100).predict(matrix, pred_contribs=True)
    np.testing.assert_allclose(forests.shap(bins.codes)[0], theirs, atol=1e-5)


def test_no_rows_give_no_values():
    _, _, bins, forests = fitted(20, 3)
    assert forests.shap(bins.codes[:0]).shape == (3, 0, 4)
