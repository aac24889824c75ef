"""The design matrix can be cut by rows and columns, and keeps what its codes mean."""

import math

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.table import Table

NAN = np.nan


@pytest.fixture
def table() -> Table:
    values = np.array([[20.0, 25.0, 1.0, NAN], [21.0, NAN, NAN, 8.0], [22.0, 27.0, 0.0, 15.0]])
    features = ("log_params", "log_tokens", "block_type", "share_code")
    return Table(
        ("a", "b", "c"),
        features,
        values,
        {"block_type": ("parallel", "sequential")},
        ("A", "A", "C"),
        ("", "2023-01", "2024-02"),
    )


def test_selection_keeps_order_and_categories(table):
    selected = table.select(["share_code", "block_type"])
    assert selected.features == ("share_code", "block_type")
    assert np.array_equal(selected.values, table.values[:, [3, 2]], equal_nan=True)
    assert selected.categories == table.categories
    assert table.select(["share_code"]).categories == {}
    assert table.select([]).values.shape == (3, 0)


@pytest.mark.parametrize("index", [np.array([2, 0]), np.array([True, False, True])], ids=["numbers", "mask"])
def test_rows_carry_families_and_months(table, index):
    chosen = table.rows(index)
    order = [2, 0] if index.dtype != bool else [0, 2]
    assert chosen.models == tuple(table.models[row] for row in order)
    assert chosen.families == tuple(table.families[row] for row in order)
    assert chosen.released == tuple(table.released[row] for row in order)
    assert np.array_equal(chosen.values, table.values[order], equal_nan=True)
    assert len(table.rows(np.array([], int))) == 0


def test_compute_is_six_n_d(table):
    assert table.flops[0] == pytest.approx(math.log(6 * math.exp(20) * math.exp(25)))
    assert np.isnan(table.flops[1])


def test_indicators_are_of_the_features_with_missing_values(table):
    widened = table.with_missing_indicators()
    assert widened.features == (*table.features, "log_tokens missing", "block_type missing", "share_code missing")
    assert widened.values[:, 4:].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert np.array_equal(widened.values[:, :4], table.values, equal_nan=True)
    assert table.rows(np.array([2])).with_missing_indicators().features == table.features


def test_a_feature_that_is_not_there_is_named_with_those_that_are(table):
    with pytest.raises(UserError, match="no feature depth: it has log_params, log_tokens, block_type, share_code"):
        table.select(["depth"])
    with pytest.raises(UserError, match="no feature depth"):
        table.column("depth")


def test_tables_that_do_not_fit_together_are_refused():
    values = np.zeros((2, 1))
    with pytest.raises(ValueError, match="values has 2 rows, families has 1"):
        Table(("a", "b"), ("x",), values, {}, ("A",), ("", ""))
    with pytest.raises(ValueError, match="values has 1 columns, features has 2"):
        Table(("a", "b"), ("x", "y"), values, {}, ("A", "A"), ("", ""))
    with pytest.raises(ValueError, match="x has other codes than 0 to 1"):
        Table(("a", "b"), ("x",), values + 2, {"x": ("no", "yes")}, ("A", "A"), ("", ""))
