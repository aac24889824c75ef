"""Metrics against scipy, scikit-learn and pairs counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from scaling_meta.metrics import decision_accuracy, mae, r2, rmse, spearman

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12).map(
    lambda rows: np.array(rows, float).T
)


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_metrics_are_those_of_the_libraries(data):
    y, predicted = data
    assert mae(y, predicted) == pytest.approx(sklearn.mean_absolute_error(y, predicted))
    assert rmse(y, predicted) == pytest.approx(sklearn.root_mean_squared_error(y, predicted))
    if np.ptp(y):
        assert r2(y, predicted) == pytest.approx(sklearn.r2_score(y, predicted))
    if np.ptp(y) and np.ptp(predicted):
        assert spearman(y, predicted) == pytest.approx(stats.spearmanr(y, predicted).statistic)
    else:
        assert np.isnan(spearman(y, predicted))


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_decision_accuracy_counts_pairs_of_unequal_scores_with_ties_half(data):
    y, predicted = data
    points = [
        0.5 if predicted[i] == predicted[j] else float((y[i] > y[j]) == (predicted[i] > predicted[j]))
        for i in range(len(y))
        for j in range(i)
        if y[i] != y[j]
    ]
    found = decision_accuracy(y, predicted)
    assert np.isnan(found) if not points else found == pytest.approx(np.mean(points))
    if points:
        assert decision_accuracy(y, -predicted) == pytest.approx(1 - found)


def test_pairs_within_their_standard_errors_are_no_decisions():
    y, predicted = np.array([0.50, 0.51, 0.70]), np.array([0.6, 0.5, 0.7])
    assert decision_accuracy(y, predicted) == pytest.approx(2 / 3)
    assert decision_accuracy(y, predicted, np.full(3, 0.01)) == 1.0
    assert decision_accuracy(y, predicted, np.full(3, np.nan)) == pytest.approx(2 / 3)
    assert np.isnan(decision_accuracy(y, predicted, np.full(3, 1.0)))


def test_r2_of_scores_that_do_not_vary_is_undefined():
    assert np.isnan(r2(np.ones(3), np.zeros(3)))
