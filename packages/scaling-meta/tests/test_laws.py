"""Scaling laws find the parameters that made the scores, and go on beyond the data."""

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.laws import PowerLaw, Sigmoid

from .synthetic import scale_score, table


def power_law(some, floor, ceiling):
    size, tokens = np.exp(some.column("log_params")), np.exp(some.column("log_tokens"))
    return floor + (ceiling - floor) * np.exp(-(300 * size**-0.3 + 4000 * tokens**-0.32))


@pytest.mark.parametrize(("floor", "ceiling"), [(0.25, 0.9), (0.6, 0.3)])
def test_a_power_law_is_recovered_rising_or_falling(floor, ceiling):
    some = table()
    found = PowerLaw().fit(some, power_law(some, floor, ceiling))
    larger = table(seed=1)
    larger.values[:, 0] += np.log(10)
    assert found.predict(larger) == pytest.approx(power_law(larger, floor, ceiling), abs=2e-3)
    assert found.shape[1::2] == pytest.approx([0.3, 0.32], abs=0.02)
    assert (found.floor, found.ceiling) == (pytest.approx(floor, abs=0.02), pytest.approx(ceiling, abs=0.02))


def test_a_sigmoid_of_compute_is_recovered():
    some = table()
    found = Sigmoid().fit(some, scale_score(some))
    assert (found.floor, found.ceiling, found.shape[0]) == pytest.approx((0.25, 0.9, 0.6), abs=1e-3)
    larger = table(seed=1)
    larger.values[:, 0] += np.log(10)
    assert found.predict(larger) == pytest.approx(scale_score(larger), abs=1e-3)


@pytest.mark.parametrize("law", [PowerLaw(), Sigmoid()], ids=lambda law: type(law).__name__)
def test_a_law_is_monotone_in_size_and_in_tokens_and_within_its_bounds(law):
    some, generator = table(), np.random.default_rng(0)
    found = law.fit(some, np.clip(scale_score(some) + generator.normal(0, 0.1, len(some)), 0, 1))
    grid = table(families=1, siblings=50)
    for column in (0, 1):
        grid.values[:, :2] = some.values[:, :2].mean(0)
        grid.values[:, column] = np.linspace(10, 40, 50)
        predicted = found.predict(grid)
        assert np.all(np.diff(predicted) >= 0)
        assert predicted.min() >= 0
        assert predicted.max() <= 1


def test_one_outlier_moves_the_law_little():
    some = table()
    y = scale_score(some)
    y[int(some.flops.argmax())] = 0.0
    assert np.abs(Sigmoid().fit(some, y).predict(some) - scale_score(some)).max() < 0.03


def test_scores_of_another_range_need_its_bounds():
    some = table()
    y = 1.5 - scale_score(some)
    assert np.abs(Sigmoid((0.0, 2.0)).fit(some, y).predict(some) - y).max() < 1e-3


def test_a_model_of_unknown_size_is_named():
    some = table()
    some.values[3, 1] = np.nan
    with pytest.raises(UserError, match="m3: params or tokens_billions is missing"):
        PowerLaw().fit(some, np.full(len(some), 0.5))
    with pytest.raises(UserError, match="m3"):
        Sigmoid().fit(table(), scale_score(table())).predict(some)
