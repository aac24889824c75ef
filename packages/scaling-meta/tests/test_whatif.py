"""Changed designs: shares still sum to 100, and there is no answer where there are no such models."""

import math
import re

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.conformal import Calibrated
from scaling_meta.regressors import regressor
from scaling_meta.support import OutsideSupport, Support
from scaling_meta.table import Table
from scaling_meta.whatif import changed, what_if

FEATURES = ("log_params", "log_tokens", "num_heads", "positional_embeddings", "share_web", "share_code", "share_books")
POSITIONS = {"positional_embeddings": ("alibi", "learned", "rope")}


@pytest.fixture(scope="module")
def table() -> Table:
    random, count = np.random.default_rng(0), 48
    code = random.uniform(0, 40, count)
    positions = np.where(np.arange(count) // 4 == 3, 1.0, 2.0)  # one family has learned ones
    values = np.column_stack([
        random.uniform(19, 25, count), random.uniform(25, 29, count), random.integers(8, 64, count), positions, 90 - code, code,
        np.full(count, 10.0),
    ])  # fmt: skip
    values[5, 5] = np.nan
    names = tuple(f"m{row}" for row in range(count))
    return Table(names, FEATURES, values, POSITIONS, tuple(f"f{row // 4}" for row in range(count)), ("",) * count)


@pytest.fixture(scope="module")
def y(table) -> np.ndarray:
    return 0.05 * table.column("log_params") - 0.01 * np.nan_to_num(table.column("share_code"), nan=20) - 0.5


def value(table, name):
    return table.column(name)[0]


def one(**values) -> Table:
    row = {
        "log_params": 22.0,
        "log_tokens": 27.0,
        "num_heads": 16.0,
        "positional_embeddings": 2.0,
        "share_web": 70.0,
        "share_code": 20.0,
    }
    row |= {"share_books": 10.0} | values
    return Table(("x",), FEATURES, np.array([[row[name] for name in FEATURES]]), POSITIONS, ("x",), ("",))


def test_shares_are_taken_from_where_it_is_said_in_proportion():
    both = changed(one(), {"share_code": "28"}, ["share_web", "share_books"])
    assert (value(both, "share_code"), value(both, "share_web"), value(both, "share_books")) == pytest.approx((28, 63, 9))
    back = changed(both, {"share_code": "20"}, ["share_web", "share_books"])
    np.testing.assert_allclose(back.values, one().values)


def test_other_fields_are_set_in_their_units():
    found = changed(one(), {"params": "7e9", "tokens_billions": "2000", "positional_embeddings": "alibi", "num_heads": "32"})
    assert value(found, "log_params") == pytest.approx(math.log(7e9))
    assert value(found, "log_tokens") == pytest.approx(math.log(2e12))
    assert (value(found, "positional_embeddings"), value(found, "num_heads")) == (0, 32)


@pytest.mark.parametrize(
    ("values", "taking", "message"),
    [
        ({"share_code": "40"}, [], r"sum to 120 %: say which shrink"),
        ({"share_code": "95"}, ["share_books"], "share_books of x have 10 %, not the 75 % to take"),
        ({"share_code": "140"}, ["share_web"], "share_code: 140 is not between 0 and 100"),
        ({"share_cod": "40"}, [], "--set share_cod: it is no feature"),
        ({"positional_embeddings": "none"}, [], "is none of alibi, learned, rope"),
        ({"share_code": "25"}, ["share_code"], "--from share_code"),
        ({"share_code": "25"}, ["num_heads"], "--from num_heads"),
    ],
)
def test_changes_that_cannot_be_are_refused(values, taking, message):
    with pytest.raises(UserError, match=message):
        changed(one(), values, taking)


def test_unknown_shares_can_neither_give_nor_be_measured_against():
    with pytest.raises(UserError, match="--from share_web: it is not known of x"):
        changed(one(share_web=np.nan), {"share_code": "25"}, ["share_web"])
    with pytest.raises(UserError, match="share_code of x is not known"):
        changed(one(share_code=np.nan), {"share_code": "25"}, ["share_web"])
    assert value(changed(one(share_code=np.nan), {"share_code": "15"}), "share_code") == 15


def test_an_answer_has_the_change_and_an_interval_around_the_truth(table, y):
    calibrated = Calibrated.fit(regressor("boosted"), table, y)
    before = one(share_code=8.0, share_web=82.0)
    after = changed(before, {"share_code": "30"}, ["share_web"])
    answer = what_if(calibrated, before, after, ["share_code"])
    assert answer.change.values[0] == pytest.approx(answer.after.values[0] - answer.before.values[0])
    assert answer.change.low[0] < -0.22 < answer.change.high[0]
    assert answer.change.values[0] < -0.1
    assert answer.before.low[0] < 0.05 * 22 - 0.08 - 0.5 < answer.before.high[0]
    assert [one.distance for one in answer.nearest] == sorted(one.distance for one in answer.nearest)


@pytest.mark.parametrize(
    ("design", "asked", "reason"),
    [
        (one(log_params=27.0), [], "log_params 5.32e.11 .* lies outside"),
        (one(share_code=60.0, share_web=30.0), ["share_code"], "share_code 60 lies outside 0.* to 3"),
        (one(positional_embeddings=0.0), ["positional_embeddings"], "no model has positional_embeddings alibi"),
        (one(positional_embeddings=1.0), ["positional_embeddings"], "only f3 has models with about this positional_embeddings"),
    ],
)
def test_there_is_no_answer_outside_the_support_and_the_nearest_are_named(table, design, asked, reason):
    with pytest.raises(OutsideSupport, match=rf"x lies outside what was fitted to: .*{reason}.*Nearest: m\d+ \(0\.\d\d\), "):
        Support.of(table).check(design, asked)


def test_a_combination_that_no_model_is_near_is_refused_though_each_value_was_seen():
    random = np.random.default_rng(1)
    size = np.repeat([20.0, 25.0], 20)
    values = np.column_stack([size + random.uniform(0, 0.1, 40), np.where(size == 20, 5.0, 80.0) + random.uniform(0, 1, 40)])
    table = Table(
        tuple(f"m{row}" for row in range(40)),
        ("log_params", "share_code"),
        values,
        {},
        tuple(f"f{row % 10}" for row in range(40)),
        ("",) * 40,
    )
    support, design = (
        Support.of(table),
        Table(("x",), ("log_params", "share_code"), np.array([[20.0, 80.5]]), {}, ("x",), ("",)),
    )
    design = Table(("x",), design.features, np.array([[20.05, 80.5]]), {}, ("x",), ("",))
    (reason,) = support.problems(design, ["share_code"])
    assert re.match(r"the nearest model with about this share_code, m\d+, is at distance 0\.\d\d, beyond 0\.\d\d$", reason)
    assert support.problems(Table(("x",), design.features, np.array([[20.05, 5.5]]), {}, ("x",), ("",)), ["share_code"]) == []


def test_what_is_not_known_of_a_model_counts_half_and_what_is_not_known_of_the_design_not_at_all(table):
    support = Support.of(table)
    full = one(share_code=8.0, share_web=82.0)
    distances = {near.model: near.distance for near in support.nearest(full, len(table))}
    row = table.values[5].copy()
    scaled, own = support._scale(full), support.scaled[5]
    gaps = np.abs(scaled - own)
    gaps[3] = float(row[3] != 2.0)
    gaps[5] = 0.5
    assert distances["m5"] == pytest.approx(gaps.mean())
    sparse = one(num_heads=np.nan, share_books=np.nan, share_web=np.nan, share_code=np.nan, positional_embeddings=np.nan)
    assert support.nearest(sparse)[0].distance < 0.2
