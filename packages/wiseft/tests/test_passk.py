import itertools
from fractions import Fraction
from math import comb, exp, lgamma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseft import passk
from wiseft.budget import samples_needed, within_variance
from wiseft.comparison import compare, sign_flip
from wiseft.intervals import bootstrap, unanimous_interval
from wiseft.passk import Cells, failure, pass_at_k
from wiseft.summary import summarize


def beta_counts(rng, problems, samples, a=0.4, b=0.7):
    """Problems whose Pass@1 is Beta(a, b), as benchmarks tend to look."""
    return rng.binomial(samples, rng.beta(a, b, problems))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000, 10_000])
def test_estimates_equal_exact_fractions(n):
    ks = sorted({1, min(2, n), min(7, n), n // 2 + 1, n})
    correct = sorted({0, 1, n // 3, n // 2, n - 1, n})
    found = pass_at_k(n, correct, ks)
    for (i, c), (j, k) in itertools.product(enumerate(correct), enumerate(ks)):
        exact = 1 - Fraction(comb(n - c, k), comb(n, k))
        assert abs(Fraction(float(found[i, j])) - exact) < Fraction(1, 10**12)


def test_many_samples_with_few_correct_cost_little():
    assert pass_at_k(10**9, [0, 5], [1, 10**8])[1] == pytest.approx([5e-9, 1 - 0.9**5], rel=1e-7)


def test_a_table_in_parts_gives_the_same_estimates(monkeypatch):
    correct, ks = np.arange(41), np.arange(1, 41)
    whole = pass_at_k(40, correct, ks)
    monkeypatch.setattr(passk, "_TABLE_NUMBERS", 100)  # two columns at a time
    assert np.array_equal(pass_at_k(40, correct, ks), whole)


def test_estimate_is_the_share_of_subsets_with_a_correct_sample():
    verdicts = [True, True, False, False, False, False]
    for k in range(1, 7):
        subsets = list(itertools.combinations(verdicts, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_ragged_samples_broadcast_and_keep_their_shape():
    samples, correct = np.array([[4, 9, 300], [4, 4, 9]]), np.array([[1, 2, 3], [0, 4, 9]])
    ragged = pass_at_k(samples, correct, [1, 3])
    assert ragged.shape == (2, 3, 2)
    for i, j in itertools.product(range(2), range(3)):
        assert ragged[i, j].tolist() == pass_at_k(int(samples[i, j]), int(correct[i, j]), [1, 3]).tolist()
    assert pass_at_k(10, 3, 2).shape == ()
    assert pass_at_k([], [], 5).shape == (0,)


def test_many_distinct_sample_counts_take_the_sorting_path():
    rng = np.random.default_rng(0)
    samples = rng.integers(1, 1_000_000, 50)
    assert pass_at_k(samples, samples // 2, 1) == pytest.approx(samples // 2 / samples, abs=1e-10)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_estimates_rise_with_k_and_with_correct_samples(counts):
    n, c = counts
    table = pass_at_k(n, np.arange(n + 1), np.arange(1, n + 1))
    assert ((table >= 0) & (table <= 1)).all()
    assert (np.diff(table, axis=0) >= -1e-15).all()
    assert (np.diff(table, axis=1) >= -1e-15).all()
    assert table[c, 0] == pytest.approx(c / n, abs=1e-15)
    assert table[c, n - 1] == (c > 0)


def test_estimates_are_unbiased_under_simulation():
    rng = np.random.default_rng(1)
    for rho, n, k in ((0.1, 8, 5), (0.6, 5, 2), (0.02, 64, 32)):
        estimates = pass_at_k(n, rng.binomial(n, rho, 200_000), k)
        assert abs(estimates.mean() - (1 - (1 - rho) ** k)) < 4 * estimates.std() / 200_000**0.5


@pytest.mark.parametrize(
    ("samples", "correct", "k", "message"),
    [
        ([8, 4], [1, 1], 5, "problem 1 has n = 4 samples, fewer than k = 5"),
        ([8, 4], [1, 5], 2, "problem 1 has c = 5 correct of n = 4"),
        ([8, 4], [1, -1], 2, r"correct\[1\] is -1: it must not be negative"),
        ([8, 4], [1, 1.5], 2, r"correct\[1\] is 1.5: it must be an integer"),
        ([8.0, float("nan")], [1, 1], 2, r"samples\[1\] is nan"),
        ([8, 0], [1, 0], 1, "problem 1 has no samples"),
        ([8, 2**62], [1, 1], 1, r"samples\[1\] is 4611686018427387904: it must be below 2\^31"),
        (np.array([8, 2**63], np.uint64), [1, 1], 1, r"samples\[1\] is 9223372036854775808"),
        ([8, float("inf")], [1, 1], 1, r"samples\[1\] is inf"),
        ([8, 4], [True, False], 1, "correct must be integers, got bool"),
        (8, 1, 0, "k = 0: it must be at least 1"),
        (8, 1, [2, -3], r"k\[1\] is -3"),
    ],
)
def test_counts_that_make_no_sense_name_the_problem(samples, correct, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(samples, correct, k)


def test_variance_is_the_u_statistic_over_pairs_of_samples_and_of_problems():
    samples, correct = np.array([3, 5, 8, 5]), np.array([1, 4, 0, 5])
    summary = summarize(samples, correct, 1, replicates=10)
    squared = np.mean([c * (c - 1) / (n * (n - 1)) for n, c in zip(samples, correct, strict=True)])
    rate = correct / samples
    of_pairs = np.mean([rate[i] * rate[j] for i, j in itertools.permutations(range(4), 2)])
    assert summary.bias.value == pytest.approx(1 - rate.mean())
    assert summary.variance.value == pytest.approx(squared - of_pairs)
    assert summary.naive_variance == pytest.approx(rate.var(ddof=1))


def test_variance_is_unbiased_and_the_naive_one_is_inflated_by_sampling():
    rng, a, b, n = np.random.default_rng(2), 2.0, 5.0, 4
    true = a * b / ((a + b) ** 2 * (a + b + 1))
    runs = [summarize(n, beta_counts(rng, 60, n, a, b), 1, replicates=1) for _ in range(600)]
    values = np.array([(run.variance.value, run.naive_variance) for run in runs])
    error = values.std(axis=0) / len(runs) ** 0.5
    inflation = (a / (a + b) - true - (a / (a + b)) ** 2) / n  # E[rho (1 - rho)] / n
    assert abs(values[:, 0].mean() - true) < 4 * error[0]
    assert abs(values[:, 1].mean() - true - inflation) < 4 * error[1]


def test_upper_bound_is_pass_at_2_itself_and_lies_above_pass_at_k():
    summary = summarize(32, beta_counts(np.random.default_rng(3), 400, 32), [1, 2, 4, 8, 32], replicates=10)
    assert summary.pass_at_k[0].upper_bound is None
    assert summary.pass_at_k[1].upper_bound == pytest.approx(summary.pass_at_k[1].value, abs=1e-15)
    assert all(row.upper_bound >= row.value for row in summary.pass_at_k[2:])


def test_histogram_counts_every_problem_and_closes_the_last_bin():
    histogram = summarize([3, 3, 3, 6, 6], [0, 1, 3, 5, 6], 1, replicates=1).histogram
    assert histogram.edges == (0, 0.25, 0.5, 0.75, 1)
    assert histogram.problems == (1, 1, 0, 3)


def test_what_cannot_be_estimated_is_none():
    single = summarize([1, 1, 1], [0, 1, 1], 1, replicates=10)
    assert single.variance is None
    assert summarize([4, 4], [0, 1], 2, replicates=10).variance is None
    assert summarize([1, 4, 4], [0, 1, 1], [1], replicates=10).pass_at_k[0].upper_bound is None
    alike = summarize([4, 4, 4], [2, 2, 2], 2, replicates=10)
    assert alike.variance.interval is None
    with pytest.raises(ValueError, match="0 problems"):
        summarize([], [], 1)


def test_summary_depends_on_the_seed_and_not_on_the_order_of_problems():
    rng = np.random.default_rng(4)
    correct, order = beta_counts(rng, 100, 16), rng.permutation(100)
    summary = summarize(16, correct, [1, 4], replicates=500, seed=7)
    assert summary == summarize(np.full(100, 16), correct[order], [1, 4], replicates=500, seed=7)
    assert summary.pass_at_k[1].interval != summarize(16, correct, [1, 4], replicates=500, seed=8).pass_at_k[1].interval


def test_histogram_bootstrap_has_the_law_of_resampled_problems():
    rng = np.random.default_rng(5)
    correct = beta_counts(rng, 80, 16)
    row = summarize(16, correct, 4, replicates=20_000, level=0.9).pass_at_k[0]
    values = pass_at_k(16, correct, 4)
    means = values[rng.integers(0, 80, (20_000, 80))].mean(axis=1)
    # The interval's quantiles are shifted a little for skewness.
    assert np.allclose(row.interval[:2], np.quantile(means, [0.05, 0.95]), atol=0.25 * row.standard_error)
    assert row.standard_error == pytest.approx(values.std(ddof=1) / 80**0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, a, b, n, k, runs = np.random.default_rng(6), 0.4, 0.7, 16, 4, 500
    fail = lgamma(a + b) + lgamma(b + k) - lgamma(b) - lgamma(a + b + k)
    truth = {"pass": 1 - exp(fail), "variance": a * b / ((a + b) ** 2 * (a + b + 1))}
    covered = {"pass": 0, "variance": 0}
    for _ in range(runs):
        summary = summarize(n, beta_counts(rng, 60, n, a, b), k, replicates=300, level=0.9)
        for name, (low, high, _) in (("pass", summary.pass_at_k[0].interval), ("variance", summary.variance.interval)):
            covered[name] += low <= truth[name] <= high
    four_errors = 4 * (0.9 * 0.1 / runs) ** 0.5
    assert covered["pass"] / runs == pytest.approx(0.9, abs=four_errors)
    assert covered["variance"] / runs == pytest.approx(0.9, abs=four_errors)


def test_problems_that_all_agree_get_an_exact_interval():
    row = summarize([8] * 50, [8] * 50, 4).pass_at_k[0]
    low, high, level = row.interval
    assert (row.value, high, level) == (1.0, 1.0, 0.95)
    assert low**50 == pytest.approx(0.025)  # were a share 1 - low of problems unsolvable, 50 solved ones had this chance
    middle = unanimous_interval(0.25, 50, 0.95, (0.0, 1.0))
    assert middle[0] == pytest.approx(0.25 * low)
    assert middle[1] == pytest.approx(0.25 + 0.75 * (1 - low))


def test_bootstrap_refuses_levels_and_replicates_out_of_range():
    for options in ({"level": 1.0}, {"level": 0.0}, {"replicates": 0}):
        with pytest.raises(ValueError, match="bootstrap of 3 problems"):
            bootstrap(np.zeros((1, 1)), np.array([3]), lambda mean, _: mean, [(0.0, 1.0)], **options)


def test_comparison_is_the_paired_difference():
    rng = np.random.default_rng(7)
    rho = rng.beta(0.4, 0.7, 150)
    first, second = rng.binomial(32, np.sqrt(rho)), rng.binomial(32, rho)
    paired = compare((np.full(150, 32), first), (np.full(150, 32), second), [1, 8], replicates=2000)
    gain = pass_at_k(32, first, 8) - pass_at_k(32, second, 8)
    row = paired.pass_at_k[1]
    assert row.value == pytest.approx(gain.mean())
    assert row.standard_error == pytest.approx(gain.std(ddof=1) / 150**0.5)
    assert row.interval[0] < row.value < row.interval[1]
    alone = [summarize(32, counts, 8, replicates=2000).pass_at_k[0].standard_error for counts in (first, second)]
    assert row.standard_error < np.hypot(*alone)
    assert row.p_value < 0.01
    variances = [summarize(32, counts, 1, replicates=1).variance.value for counts in (first, second)]
    assert paired.variance.value == pytest.approx(variances[0] - variances[1])
    assert paired.bias.value == pytest.approx((second.mean() - first.mean()) / 32)


def test_comparison_of_a_model_with_itself_finds_nothing():
    counts = (np.full(40, 8), beta_counts(np.random.default_rng(8), 40, 8))
    row = compare(counts, counts, 4, replicates=200).pass_at_k[0]
    assert (row.value, row.p_value) == (0.0, 1.0)
    assert row.interval[0] < 0 < row.interval[1]


def test_sign_flip_p_value_equals_the_enumeration_of_all_flips():
    differences = np.array([0.5, 0.25, 0.25, 0.75, -0.25, 1.0, 0.5, -0.5])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(sums) >= abs(differences.sum()))
    values, problems = np.unique(differences, return_counts=True)
    drawn = sign_flip(values[:, None], problems, replicates=40_000, seed=0)[0]
    assert drawn == pytest.approx(exact, abs=4 * (exact / 40_000) ** 0.5)


def test_sign_flip_rejects_a_true_null_as_often_as_it_says():
    rng, rejected = np.random.default_rng(9), 0
    for _ in range(200):
        rho = rng.beta(0.4, 0.7, 60)
        paired = compare(([8] * 60, rng.binomial(8, rho)), ([8] * 60, rng.binomial(8, rho)), 4, replicates=199)
        rejected += paired.pass_at_k[0].p_value <= 0.1
    assert rejected / 200 == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 200) ** 0.5)


def test_comparison_needs_pairs_and_gives_no_p_value_for_unequal_samples():
    with pytest.raises(ValueError, match="2 problems cannot be paired with 3"):
        compare(([4, 4], [1, 2]), ([4, 4, 4], [1, 2, 3]), 1)
    assert compare(([4, 4, 4], [1, 2, 0]), ([4, 4, 8], [1, 0, 3]), 1, replicates=50).pass_at_k[0].p_value is None


def test_budget_splits_the_variance_of_the_estimates_exactly():
    correct = beta_counts(np.random.default_rng(10), 300, 24)
    for k in (1, 3, 12):
        (budget,) = samples_needed(24, correct, k, width=0.001)
        estimates = pass_at_k(24, correct, k)
        assert budget.between_problems + budget.within_problems == pytest.approx(estimates.var(ddof=1), rel=1e-9)
        assert budget.width == pytest.approx(2 * 1.959964 * estimates.std(ddof=1) / 300**0.5, rel=1e-6)


def test_within_variance_is_that_of_the_estimator():
    rho, n, k = 0.3, 9, 4
    counts = np.arange(n + 1)
    chance = np.array([comb(n, c) * rho**c * (1 - rho) ** (n - c) for c in counts])
    estimates = pass_at_k(n, counts, k)
    exact = chance @ estimates**2 - (chance @ estimates) ** 2
    moments = (1 - rho) ** np.arange(k, 2 * k + 1)
    assert within_variance(n, k, moments) == pytest.approx(exact, rel=1e-9)
    assert within_variance(5, k, moments) > exact  # fewer samples than 2k: every two draws share some


def test_budget_of_equal_problems_is_the_binomial_one():
    # Every rho is 1/2, so V = 0.25 / n; the counts lie as a binomial would, hence B is estimated as 0 or nearly so.
    n = 64
    correct = np.repeat(np.arange(n + 1), [round(20_000 * comb(n, c) / 2**n) for c in range(n + 1)])
    (budget,) = samples_needed(n, correct, 1, width=0.001, level=0.95)
    assert budget.samples_per_problem == pytest.approx(0.25 / (len(correct) * (0.0005 / 1.959964) ** 2), rel=0.05)
    assert budget.more_samples == len(correct) * (budget.samples_per_problem - n)
    assert "samples per problem (now 64)" in budget.advice


def test_budget_says_when_samples_cannot_help_and_when_it_cannot_know():
    correct = np.array([0] * 50 + [32] * 50)  # all the variance lies between problems
    hopeless, unknown, enough = (
        samples_needed(32, correct, 1, width=0.05)[0],
        samples_needed(32, correct, 20, width=0.05)[0],
        samples_needed(32, correct, 1, width=0.9)[0],
    )
    assert hopeless.samples_per_problem is None
    assert hopeless.problems == pytest.approx(25 / 99 * (2 * 1.959964 / 0.05) ** 2, abs=1)
    assert hopeless.advice.startswith("more samples cannot help")
    assert unknown.between_problems is None
    assert unknown.advice.startswith("draw at least 40 samples per problem")
    assert enough.advice.startswith("enough")
    with pytest.raises(ValueError, match=r"width is 1.5"):
        samples_needed(4, [1, 2], 1, width=1.5)


def test_cells_group_equal_counts():
    cells = Cells.of([4, 8, 4, 8], [1, 1, 1, 2])
    assert list(zip(cells.samples.tolist(), cells.correct.tolist(), cells.problems.tolist(), strict=True)) == [
        (4, 1, 2),
        (8, 1, 1),
        (8, 2, 1),
    ]
    assert cells.index.tolist() == [0, 1, 0, 2]
    assert failure(cells, np.array([1]))[:, 0] == pytest.approx([3 / 4, 7 / 8, 6 / 8])


def test_a_variance_that_no_single_problem_moves_still_has_an_interval():
    variance = summarize([64] * 20, [0] * 10 + [64] * 10, 1, replicates=1000).variance
    low, high, _ = variance.interval
    assert variance.standard_error == pytest.approx(0, abs=1e-12)
    assert low < 0.2 < high <= 0.27
