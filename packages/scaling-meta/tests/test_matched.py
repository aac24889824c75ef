"""Matched pairs of a handmade table."""

import numpy as np
import pytest

from scaling_meta.database import Database, Scores
from scaling_meta.matched import matched_pairs, sign_tests
from scaling_meta.table import Table

NAN = np.nan
FEATURES = ("log_params", "log_tokens", "block_type", "share_web", "share_code", "num_heads")
ROWS = {
    # name: family, features, score
    "a-1b": ("A", [20.0, 25.0, 0, 80, 10, 8], 0.30),
    "a-1b-parallel": ("A", [20.0, 25.0, 1, 80, 10, 8], 0.35),
    "a-1b-code": ("A", [20.0, 25.0, 0, 50, 40, 8], 0.20),
    "a-1b-both": ("A", [20.0, 25.0, 1, 50, 40, 8], 0.25),
    "a-9b": ("A", [23.0, 25.0, 0, 80, 10, 8], 0.60),
    "b-1b": ("B", [20.0, 25.0, 0, 80, 10, NAN], 0.31),
    "b-1b-deduped": ("B", [20.2, 25.0, 0, 80, 10, 8], 0.36),
    "c-1b": ("C", [20.0, 25.0, 1, 80, 10, 8], 0.90),
    "d-1b": ("D", [20.0, 25.0, 0, 80, 10, 8], NAN),
    "d-1b-deduped": ("D", [20.0, 25.0, 0, 80, 10, 8], 0.40),
}


@pytest.fixture
def pairs():
    families = tuple(family for family, _, _ in ROWS.values())
    values, y = np.array([row for _, row, _ in ROWS.values()]), np.array([score for _, _, score in ROWS.values()])
    table = Table(tuple(ROWS), FEATURES, values, {"block_type": ("parallel", "sequential")}, families, ("",) * len(ROWS))
    return matched_pairs(table, Scores(y, np.full(len(ROWS), 0.03)))


def test_pairs_differ_in_one_thing_within_a_family(pairs):
    found = {(pair.first, pair.second): (pair.change, round(pair.difference, 6)) for pair in pairs}
    assert found == {
        ("a-1b", "a-1b-parallel"): ("block_type parallel -> sequential", 0.05),
        ("a-1b-code", "a-1b-both"): ("block_type parallel -> sequential", 0.05),
        ("a-1b", "a-1b-code"): ("share_code up", -0.1),
        ("a-1b-parallel", "a-1b-both"): ("share_code up", -0.1),
        ("b-1b", "b-1b-deduped"): ("training data deduplicated", 0.05),
    }


def test_a_mix_of_data_is_one_change_and_is_spelled_out(pairs):
    (pair,) = [pair for pair in pairs if (pair.first, pair.second) == ("a-1b", "a-1b-code")]
    assert (pair.detail, pair.step) == ("share_web 80 -> 50, share_code 10 -> 40", 30.0)


def test_differences_in_scale_are_taken_off_by_the_slope_within_families(pairs):
    (pair,) = [pair for pair in pairs if pair.family == "B"]
    # the mean over siblings is taken off; A's five models have sizes 20 (four of them) and 23
    x = np.array([-0.6, -0.6, -0.6, -0.6, 2.4, -0.1, 0.1])
    scores = np.array([0.30, 0.35, 0.20, 0.25, 0.60, 0.31, 0.36])
    scores[:5] -= scores[:5].mean()
    scores[5:] -= scores[5:].mean()
    assert pair.log_ratios == pytest.approx((0.2, 0.0))
    assert pair.adjusted == pytest.approx(0.05 - 0.2 * float(x @ scores / (x @ x)))
    assert pair.unknown == ("num_heads",)
    assert pair.stderr == pytest.approx(0.03 * 2**0.5)


def test_a_model_counts_once_in_a_sign_test(pairs):
    found = {test.change: test for test in sign_tests(pairs)}
    code = found["share_code up"]
    assert (code.all_pairs, code.pairs, code.higher, code.families, code.p) == (2, 2, 0, ("A",), 0.5)
    assert code.median == pytest.approx(-0.1)
    chain = [pair for pair in pairs if pair.change == "share_code up"]
    longer = [chain[0], type(chain[0])(**{**vars(chain[1]), "first": chain[0].second, "step": 50.0})]
    (test,) = sign_tests(longer)
    assert (test.all_pairs, test.pairs) == (2, 1)


def test_the_shipped_database_has_the_known_experiments():
    database = Database.shipped()
    table = database.table()
    found = matched_pairs(table, database.scores("lambada", table.models))
    tests = {test.change: test for test in sign_tests(found)}
    assert tests["training data deduplicated"].pairs == 7
    assert tests["training data deduplicated"].families == ("Pythia",)
    assert {"CodeGen", "Llama-2-220M"} <= set(tests["share_code up"].families)
    mono = [pair for pair in found if pair.first.endswith("-nl") and pair.second.endswith("-mono")]
    assert len(mono) == 4
    assert all(pair.difference < -0.2 for pair in mono)  # language is lost
