import math

import numpy as np
import pytest
from scipy.stats import beta

from lmcore.errors import UserError
from weightwatch.planning import calibration_size, fpr_bound, plan


def test_the_least_size_is_that_from_which_on_conformal_can_flag():
    for alpha in (0.5, 0.3, 0.1, 0.07, 0.05, 0.02, 0.01, 0.001):
        size = calibration_size(alpha)
        assert math.floor(alpha * (size + 1) + 1e-9) == 1
        assert math.floor(alpha * size + 1e-9) == 0


@pytest.mark.parametrize(
    ("alpha", "confidence", "slack"), [(0.05, 0.9, 0.5), (0.02, 0.95, 0.3), (0.1, 0.8, 1.0), (0.3, 0.5, 2.0)]
)
def test_with_confidence_it_is_the_least_size_from_which_on_the_beta_law_holds(alpha, confidence, slack):
    def holds(size):
        rank = math.floor(alpha * (size + 1) + 1e-9)
        return rank >= 1 and beta.cdf((1 + slack) * alpha, rank, size + 1 - rank) >= confidence

    size = calibration_size(alpha, confidence=confidence, slack=slack)
    assert not holds(size - 1)
    assert all(map(holds, range(size, 3 * size)))


def test_the_rate_of_a_drawn_calibration_follows_the_beta_law():
    alpha, generator = 0.05, np.random.default_rng(0)
    size = calibration_size(alpha, confidence=0.9, slack=0.5)
    rank = math.floor(alpha * (size + 1))
    threshold = np.sort(generator.uniform(size=(4000, size)), 1)[
        :, size - rank
    ]  # the rank-th largest score of each calibration
    within = float((1 - threshold <= 1.5 * alpha).mean())
    assert abs(within - 0.9) < 0.025  # five standard errors of 4,000 draws; at this size the law itself is 0.900 to 0.915


def test_confidence_costs_more_inputs_and_less_slack_costs_more_still():
    assert calibration_size(0.01) < calibration_size(0.01, confidence=0.9) < calibration_size(0.01, confidence=0.9, slack=0.2)
    assert calibration_size(0.01, confidence=0.9) < calibration_size(0.01, confidence=0.99)


def test_bound_of_the_paper():
    assert fpr_bound(1160, 50_000) == 2320 / 50_001
    assert fpr_bound(1160, 100) == 1.0


def test_the_plan_has_a_row_per_alpha():
    rows = plan(1080, [0.02, 0.01])
    assert [row["on average"] for row in rows] == [98, 198]
    assert all(fpr_bound(1080, row["min/max"]) <= row["alpha"] < fpr_bound(1080, row["min/max"] - 1) for row in rows)


@pytest.mark.parametrize(
    "bad", [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.1, "confidence": 1.0}, {"alpha": 0.1, "slack": 0.0}]
)
def test_impossible_wishes_are_refused(bad):
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        calibration_size(**bad)
