"""Tests against scipy and by hand, and how often they cry wolf where there is nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from scaling_meta.inference import benjamini_hochberg, family_permutation, nadeau_bengio, paired_t_test, relative_gain


def test_the_naive_test_is_the_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 20))
    found, known = paired_t_test(first - second), stats.ttest_rel(first, second)
    assert (found.statistic, found.p) == (pytest.approx(known.statistic), pytest.approx(known.pvalue))


def test_the_corrected_test_widens_the_variance_by_the_ratio_of_test_to_training():
    differences = np.random.default_rng(1).normal(0.3, 1, size=30)
    naive, corrected = paired_t_test(differences), nadeau_bengio(differences, train=60, test=30)
    assert corrected.statistic == pytest.approx(naive.statistic * math.sqrt((1 / 30) / (1 / 30 + 1 / 2)))
    assert corrected.p == pytest.approx(2 * stats.t.sf(abs(corrected.statistic), 29))


def test_equal_errors_are_no_evidence():
    assert nadeau_bengio(np.zeros(5), 2, 1).p == 1.0
    assert nadeau_bengio(np.full(5, 0.1), 2, 1).p == 0.0


def test_over_splits_of_the_same_models_only_the_corrected_test_keeps_its_level():
    """Two regressors of equal worth whose errors differ by chance; 50 random splits with a third of the models for testing."""
    generator, naive, corrected, trials = np.random.default_rng(0), 0, 0, 500
    for _ in range(trials):
        models = generator.normal(size=90)
        splits = np.array([models[generator.permutation(90)[:30]].mean() for _ in range(50)])
        naive += paired_t_test(splits).p < 0.05
        corrected += nadeau_bengio(splits, train=60, test=30).p < 0.05
    assert naive / trials > 0.5
    assert 0.02 <= corrected / trials <= 0.09


def test_family_permutation_lists_all_patterns_of_few_families():
    first, second = np.array([3.0, 1.0, 2.0, 5.0]), np.array([1.0, 1.0, 1.0, 1.0])
    found = family_permutation(first, second, ["A", "A", "B", "C"])  # sums 2, 1, 4: only +++ and --- reach 7
    assert found.p == 2 / 8
    assert (found.difference, found.statistic) == (7 / 4, 7.0)
    assert family_permutation(second, first, ["A", "A", "B", "C"]).p == 2 / 8


def test_family_permutation_of_many_families_is_the_same_in_the_limit_and_never_0():
    generator = np.random.default_rng(0)
    first = generator.normal(0.25, 1, 40)
    found = family_permutation(first, np.zeros(40), [str(row) for row in range(40)])
    assert found.p == pytest.approx(stats.ttest_1samp(first, 0).pvalue, abs=0.02)
    assert family_permutation(np.ones(40), np.zeros(40), [str(row) for row in range(40)]).p == 1 / 10_000


def test_siblings_that_err_alike_fool_a_test_by_model_but_not_by_family():
    generator, trials = np.random.default_rng(0), 300
    families, alone = np.repeat(np.arange(10), 6).astype(str).tolist(), [str(row) for row in range(60)]
    rates = np.zeros(2)
    for _ in range(trials):
        first = np.repeat(generator.normal(size=10), 6) + 0.3 * generator.normal(size=60)
        for k, units in enumerate((families, alone)):
            rates[k] += family_permutation(first, np.zeros(60), units, permutations=199).p <= 0.05
    assert 0.02 <= rates[0] / trials <= 0.085
    assert rates[1] / trials > 0.3


def test_false_discovery_rates_are_scipys():
    p = np.random.default_rng(0).uniform(size=13) ** 2
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


def test_relative_gain_is_of_the_mean_errors_and_its_interval_grows_with_the_families():
    generator = np.random.default_rng(0)
    first = 0.1 + 0.05 * np.repeat(generator.uniform(size=12), 5)
    second = first * np.repeat(generator.uniform(0.5, 1.1, size=12), 5)
    families, alone = np.repeat(np.arange(12), 5).astype(str).tolist(), [str(row) for row in range(60)]
    found, narrow = relative_gain(first, second, families), relative_gain(first, second, alone)
    assert found.value == pytest.approx(1 - second.mean() / first.mean()) == narrow.value
    assert found.interval[0] < found.value < found.interval[1]
    assert np.diff(found.interval[:2]) > 1.5 * np.diff(narrow.interval[:2])


def test_the_interval_of_the_gain_covers_the_truth_about_as_often_as_it_says():
    generator, covered, trials = np.random.default_rng(3), 0, 200
    families = np.repeat(np.arange(25), 4).astype(str).tolist()
    for _ in range(trials):
        first = np.repeat(generator.exponential(size=25), 4)
        second = first * np.repeat(generator.uniform(0.6, 1.0, size=25), 4)
        low, high, _ = relative_gain(first, second, families, resamples=300).interval
        covered += low <= 0.2 <= high
    assert 0.86 <= covered / trials <= 0.98
