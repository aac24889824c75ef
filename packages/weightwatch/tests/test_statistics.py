import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lmcore.errors import UserError
from weightwatch.statistics import auroc, clopper_pearson, fpr_curve, tpr_at_fpr

scores = st.lists(st.integers(0, 6), min_size=1, max_size=12).map(lambda values: np.array(values, float))


@given(st.integers(1, 300).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
@settings(max_examples=50, deadline=None)
def test_the_ends_of_clopper_pearson_are_where_the_binomial_tail_is_half_of_the_rest(counts):
    successes, trials = counts
    low, high, level = clopper_pearson(successes, trials).interval
    assert level == 0.95
    assert low == 0.0 if successes == 0 else binom.sf(successes - 1, trials, low) == pytest.approx(0.025, rel=1e-6)
    assert high == 1.0 if successes == trials else binom.cdf(successes, trials, high) == pytest.approx(0.025, rel=1e-6)


def test_183_clean_inputs_without_a_flag_put_the_rate_below_two_percent():
    assert clopper_pearson(0, 183).interval[1] < 0.02 < clopper_pearson(0, 182).interval[1]


@given(scores, scores)
@settings(max_examples=100, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_half(clean, triggered):
    pairs = (triggered[:, None] > clean) + 0.5 * (triggered[:, None] == clean)
    estimate = auroc(clean, triggered)
    assert estimate.value == pytest.approx(pairs.mean(), abs=1e-12)
    low, high, _ = estimate.interval
    assert 0 <= low <= estimate.value <= high <= 1
    assert high - low > 0
    assert auroc(triggered, clean).value == pytest.approx(1 - estimate.value, abs=1e-12)


def test_the_interval_of_auroc_covers_the_true_area_as_often_as_it_says():
    generator, truth, covered, trials = np.random.default_rng(0), 0.921350396474857, 0, 1000  # Phi(2 / sqrt 2)
    for _ in range(trials):
        low, high, _ = auroc(generator.normal(size=60), generator.normal(2.0, size=40)).interval
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.98


def test_perfect_separation_keeps_an_interval():
    estimate = auroc(np.arange(10.0), np.arange(20.0, 60.0))
    assert estimate.value == 1.0
    assert estimate.interval == (pytest.approx(0.025 ** (1 / 10)), 1.0, 0.95)
    assert auroc(np.arange(20.0, 60.0), np.array([-np.inf])).interval[1] == pytest.approx(0.975)


@given(scores, scores, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
@settings(max_examples=100, deadline=None)
def test_the_threshold_keeps_the_rate_on_clean_scores_and_no_lower_one_does(clean, triggered, fpr):
    found = tpr_at_fpr(clean, triggered, fpr)
    assert found.fpr == (clean > found.threshold).mean() <= fpr + 1e-12
    assert found.tpr.value == pytest.approx((triggered > found.threshold).mean())
    lower = np.unique(clean)[np.unique(clean) < found.threshold]
    assert not len(lower) or (clean > lower[-1]).mean() > fpr


def test_false_alarms_of_min_max_fall_as_one_over_n_and_stay_below_the_bound():
    generator = np.random.default_rng(0)
    centers = generator.uniform(-0.2, 0.2, (1, 1, 6))
    low = (centers - generator.gamma(2, 0.02, (2400, 1, 6))).astype(np.float32)
    high = (centers + generator.gamma(2, 0.02, (2400, 1, 6))).astype(np.float32)
    rows = fpr_curve(low[:400], high[:400], low[400:], high[400:], [25, 50, 100, 200], repeats=30)
    assert [row["inputs"] for row in rows] == [25, 50, 100, 200]
    assert all(row["range"][0] <= row["fpr"] <= row["range"][1] and row["fpr"] < row["bound"] for row in rows)
    for row, twice in itertools.pairwise(rows):
        assert 1.5 < row["fpr"] / twice["fpr"] < 2.5
    assert rows[-1]["fpr"] == pytest.approx(12 / 201, rel=0.25)  # independent directions nearly reach the bound


def test_epsilon_lowers_the_curve_and_both_roles_count_in_the_bound():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 0.1, (2, 300, 2, 3)).astype(np.float32)
    low, high = values.min(0), values.max(0)
    strict, loose = (fpr_curve(low[:200], high[:200], low[200:], high[200:], [100], epsilon=e)[0] for e in (0.0, 0.1))
    assert loose["fpr"] < strict["fpr"]
    assert strict["bound"] == pytest.approx(2 * 2 * 3 / 101)
    low[:, 1], high[:, 1] = np.inf, -np.inf
    assert fpr_curve(low[:200], high[:200], low[200:], high[200:], [100])[0]["bound"] == pytest.approx(2 * 3 / 101)


def test_empty_samples_and_nan_are_refused():
    with pytest.raises(UserError, match="0 clean scores"):
        auroc(np.zeros(0), np.zeros(3))
    with pytest.raises(UserError, match="1 of 2 triggered scores are NaN"):
        tpr_at_fpr(np.zeros(3), np.array([0.0, np.nan]), 0.1)
    with pytest.raises(UserError, match="fpr is 1"):
        tpr_at_fpr(np.zeros(3), np.zeros(3), 1.0)
    with pytest.raises(UserError, match=r"subsets of 4 inputs"):
        fpr_curve(*[np.zeros((4, 1, 1), np.float32)] * 4, [5])
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        clopper_pearson(3, 2)
