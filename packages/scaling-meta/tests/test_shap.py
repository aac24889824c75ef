"""SHAP values add up, are xgboost's, and are of models that the trees have not seen where they should be."""

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.bootstrap import estimate, family_draws
from scaling_meta.shap import explain, fit, task_similarity
from scaling_meta.splits import family_folds, random_folds
from scaling_meta.table import Table

xgboost = pytest.importorskip("xgboost")
ONCE = np.ones((1, 60), np.uint8)


@pytest.fixture(scope="module")
def table() -> Table:
    random = np.random.default_rng(1)
    values = np.column_stack(
        [random.normal(22, 2, 60), random.normal(27, 1, 60), random.integers(0, 3, 60), random.uniform(0, 50, 60)]
    )
    values[random.random((60, 4)) < 0.15] = np.nan
    features, categories = (
        ("log_params", "log_tokens", "positional_embeddings", "share_code"),
        {"positional_embeddings": tuple("abc")},
    )
    names = tuple(f"m{row}" for row in range(60))
    return Table(names, features, values, categories, tuple(f"f{row % 15}" for row in range(60)), ("",) * 60)


@pytest.fixture(scope="module")
def y(table) -> np.ndarray:
    return (
        0.1 * np.nan_to_num(table.values[:, 0], nan=20) + 0.01 * np.nan_to_num(table.values[:, 3]) + np.sin(np.arange(60)) / 20
    )


def contributions(table, y, rows, explained):
    data = xgboost.DMatrix(table.values[rows], y[rows].astype(np.float32))
    options = {"max_depth": 3, "eta": 0.1, "tree_method": "hist", "nthread": 1}
    return xgboost.train(options, data, 100).predict(xgboost.DMatrix(table.values[explained]), pred_contribs=True)


def test_in_sample_values_are_those_of_xgboost(table, y):
    found, wanted = explain(table, y, ONCE), contributions(table, y, np.arange(60), np.arange(60))
    np.testing.assert_allclose(found.values[0], wanted[:, :-1], atol=2e-6)
    np.testing.assert_allclose(found.base[0], wanted[:, -1], atol=2e-6)


def test_held_out_values_are_those_of_trees_that_never_saw_the_model(table, y):
    splits = random_folds(60)
    found = explain(table, y, ONCE, splits=splits)
    for split in splits:
        np.testing.assert_allclose(
            found.values[0, split.test], contributions(table, y, split.train, split.test)[:, :-1], atol=2e-6
        )
    changed = y.copy()
    changed[splits[0].test] += 1
    again = explain(table, changed, ONCE, splits=splits)
    assert np.array_equal(found.values[0, splits[0].test], again.values[0, splits[0].test])


def test_a_draw_is_a_fit_to_its_families_as_often_as_they_were_drawn(table, y):
    draws = family_draws(table.families, 2, seed=3)
    assert draws.max() > 1
    found, rows = explain(table, y, draws), np.repeat(np.arange(60), draws[2])
    np.testing.assert_allclose(found.values[2], contributions(table, y, rows, np.arange(60))[:, :-1], atol=2e-5)


def test_values_and_base_add_up_to_the_prediction(table, y):
    draws = family_draws(table.families, 3)
    found, forests = explain(table, y, draws), fit(table, y, draws)
    from scaling_meta.ops.bins import binned

    np.testing.assert_allclose(found.base + found.values.sum(2), forests.predict(binned(table.values).codes), atol=1e-5)


def test_repeats_are_averaged(table, y):
    both = explain(table, y, ONCE, splits=random_folds(60, seeds=(0, 1))).values
    each = [explain(table, y, ONCE, splits=random_folds(60, seeds=(seed,))).values for seed in (0, 1)]
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, atol=1e-12)


def test_features_that_matter_are_important_and_groups_are_of_sums(table, y):
    found = explain(table, y, family_draws(table.families, 40))
    size, data = found.importance(["log_params"]), found.importance(["share_code"])
    assert size.value > 3 * found.importance(["log_tokens"]).value
    assert size.interval[0] < size.value < size.interval[1]
    together = found.importance(["log_params", "share_code"])
    assert abs(size.value - data.value) <= together.value <= size.value + data.value


def test_draws_come_by_family_and_start_with_the_data(table):
    draws = family_draws(table.families, 50, seed=1)
    assert draws.shape == (51, 60)
    assert (draws[0] == 1).all()
    of = np.array(table.families)
    assert all(len({*draws[5, of == family].tolist()}) == 1 for family in set(table.families))
    assert (draws[:, [table.families.index(f"f{n}") for n in range(15)]].sum(1) == 15).all()
    assert np.array_equal(draws, family_draws(table.families, 50, seed=1))


def test_an_estimate_has_the_percentiles_of_the_draws():
    found = estimate(np.array([5.0, *np.arange(101.0)]), 0.9)
    assert found.value == 5.0
    assert found.interval == pytest.approx((5.0, 95.0, 0.9))
    assert np.isnan(estimate(np.array([5.0])).interval[0])


def test_tasks_that_respond_alike_are_neighbours(table, y):
    other = 0.3 * (table.column("positional_embeddings") == 1) + 0.01 * np.nan_to_num(table.column("log_tokens"))
    tasks = {"arc_challenge": y, "humaneval": other, "hellaswag": y + 0.01 * np.cos(np.arange(60)), "xnli": -y}
    found = task_similarity({name: explain(table, target, ONCE) for name, target in tasks.items()})
    assert found.tasks.index("humaneval") in (0, 3)
    place = found.tasks.index
    assert found.correlation[place("arc_challenge"), place("hellaswag")] > 0.8
    assert found.correlation[place("arc_challenge"), place("xnli")] > 0.8  # lower is better there
    assert abs(found.correlation[place("arc_challenge"), place("humaneval")]) < 0.5


def test_what_cannot_be_explained_is_refused(table, y):
    with pytest.raises(UserError, match="m3 has no score"):
        explain(table, np.where(np.arange(60) == 3, np.nan, y), ONCE)
    with pytest.raises(UserError, match="in no test set"):
        explain(table, y, ONCE, splits=random_folds(60)[:1])
    with pytest.raises(UserError, match="needs two"):
        family_draws(["A", "A"], 3)
    nothing = ONCE.copy()
    nothing[0, family_folds(table.families)[0].train] = 0
    with pytest.raises(UserError, match="no model to train on where f0 is held out"):
        explain(table, y, nothing, splits=family_folds(table.families))
    with pytest.raises(UserError, match="two of each"):
        task_similarity({"arc_challenge": explain(table, y, ONCE)})
