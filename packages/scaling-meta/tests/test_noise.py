"""Evaluation noise: how much error remains for a perfect prediction, and what models with noisier scores weigh."""

import numpy as np
import pytest

from scaling_meta.database import Database, Scores
from scaling_meta.noise import ITEMS, noise, standard_errors, weights


def test_a_perfect_prediction_is_off_by_the_floor_and_all_of_its_error_is_noise():
    random = np.random.default_rng(0)
    stderr = random.uniform(0.01, 0.03, 20_000)
    found = noise(stderr, random.normal(0, stderr))
    assert found.floor == pytest.approx(np.abs(random.normal(0, stderr)).mean(), rel=0.02)
    assert found.share == pytest.approx(1, rel=0.03)
    assert noise(stderr, random.normal(0, np.sqrt(stderr**2 + 0.03**2))).share == pytest.approx(0.0004333 / 0.0013333, rel=0.03)


def test_unknown_standard_errors_are_binomial_where_the_number_of_items_is_known():
    scores = Scores(np.array([0.25, 0.25, 0.0]), np.array([0.02, np.nan, 0.0]))
    assert standard_errors("gsm8k", scores)[0] == 0.02
    assert standard_errors("gsm8k", scores)[1] == pytest.approx((0.25 * 0.75 / 1319) ** 0.5, rel=1e-2)
    assert 0 < standard_errors("humaneval", scores)[2] < 0.01
    assert np.isnan(standard_errors("anli", scores)[1])
    assert noise(np.full(3, np.nan), np.zeros(3)) is None


def test_the_reported_errors_of_accuracies_are_those_of_their_number_of_items():
    database = Database.shipped()
    models = database.table().models
    for task in ("arc_challenge", "hellaswag", "winogrande", "gsm8k", "humaneval"):
        scores = database.scores(task, models)
        known = scores.stderr > 0
        p = scores.values[known]
        assert np.median(scores.stderr[known] / np.sqrt(p * (1 - p) / ITEMS[task])) == pytest.approx(1, abs=0.02)


def test_weights_are_even_where_the_fit_errs_much_and_follow_the_noise_where_it_does_not():
    stderr = np.array([0.01, 0.02, np.nan])
    assert weights(stderr, np.full(3, 10.0)) == pytest.approx(np.ones(3), rel=1e-4)
    sharp = weights(stderr, np.zeros(3))
    assert sharp[0] / sharp[1] == pytest.approx(4)
    assert sharp[1] < sharp[2] < sharp[0]
    assert sharp.mean() == pytest.approx(1)
    assert np.array_equal(weights(np.full(2, np.nan), np.ones(2)), np.ones(2))


def test_weights_make_a_mean_of_noisy_scores_more_exact():
    random = np.random.default_rng(1)
    stderr = np.array([0.01] * 5 + [0.1] * 5)
    errors = random.normal(0, stderr, (2000, 10))
    weighted = np.array([np.average(one, weights=weights(stderr, one - one.mean())) for one in errors])
    assert weighted.std() < 0.7 * errors.mean(1).std()
