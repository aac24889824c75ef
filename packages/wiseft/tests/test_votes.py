import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseft import votes
from wiseft.ops.majority import numba, reference
from wiseft.passk import pass_at_k
from wiseft.votes import best_at_k, majority_at_k


def majority_over_subsets(answers, correct, k):
    """The definition: every subset of k votes, a tie counts the share of its answers that are correct."""
    total = 0.0
    for chosen in itertools.combinations(range(len(answers)), k):
        given = [answers[i] for i in chosen if answers[i] is not None]
        most = max(map(given.count, given), default=0)
        tied = {answer for answer in given if given.count(answer) == most}
        right = {answers[i] for i in chosen if correct[i]}
        total += len(tied & right) / len(tied) if tied else 0.0
    return total / comb(len(answers), k)


def best_over_subsets(scores, correct, k):
    total = 0.0
    for chosen in itertools.combinations(range(len(scores)), k):
        tied = [i for i in chosen if scores[i] == max(scores[j] for j in chosen)]
        total += sum(correct[i] for i in tied) / len(tied)
    return total / comb(len(scores), k)


samples = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(samples, st.sets(st.sampled_from("abcd")), st.data())
def test_majority_equals_the_mean_over_all_subsets(answers, right, data):
    k = data.draw(st.integers(1, len(answers)))
    correct = [answer in right for answer in answers]
    vote = majority_at_k([answers], [correct], k)
    assert vote.accuracy[0] == pytest.approx(majority_over_subsets(answers, correct, k), abs=1e-12)
    assert vote.standard_error[0] == 0


def test_compiled_majority_equals_the_sum_in_whole_numbers():
    rng = np.random.default_rng(0)
    for _ in range(40):
        counts = rng.integers(1, 12, rng.integers(1, 7))
        right, abstentions = rng.random(len(counts)) < 0.5, int(rng.integers(0, 6))
        k = int(rng.integers(1, counts.sum() + abstentions + 1))
        exact = reference.majority(counts, right, abstentions, k)
        assert numba.majority(counts, right, abstentions, k) == pytest.approx(exact, rel=1e-12)


def test_majority_of_large_sets_stays_accurate():
    # Two answers, 300 and 200 of 500: the vote of 101 is a hypergeometric tail, summed here in whole numbers.
    exact = sum(comb(300, v) * comb(200, 101 - v) for v in range(51, 102)) / comb(500, 101)
    vote = majority_at_k([["a"] * 300 + ["b"] * 200], [[True] * 300 + [False] * 200], 101)
    assert vote.standard_error[0] == 0
    assert vote.accuracy[0] == pytest.approx(exact, rel=1e-10)


def test_drawn_votes_agree_with_the_exact_sum_within_their_error(monkeypatch):
    rng = np.random.default_rng(1)
    answers = [[f"{a}" if a else None for a in rng.geometric(0.4, 40) - 1] for _ in range(5)]
    correct = [[answer in ("1", "3") for answer in given] for given in answers]
    exact = majority_at_k(answers, correct, 15)
    monkeypatch.setattr(votes, "_EXACT_WORK", 0)
    drawn = majority_at_k(answers, correct, 15, seed=3)
    assert (np.abs(drawn.accuracy - exact.accuracy) < 4 * drawn.standard_error).all()
    assert drawn.accuracy.tolist() == majority_at_k(answers, correct, 15, seed=3).accuracy.tolist()
    assert drawn.accuracy.tolist() != majority_at_k(answers, correct, 15, seed=4).accuracy.tolist()


def test_whole_set_votes_once_and_needs_no_sum():
    answers, correct = [["a"] * 900 + ["b"] * 900 + [None] * 200], [[True] * 900 + [False] * 900 + [False] * 200]
    assert majority_at_k(answers, correct, 2000).accuracy[0] == 0.5
    assert majority_at_k([[None, None]], [[False, False]], 2).accuracy[0] == 0


@pytest.mark.parametrize(
    ("answers", "correct", "k", "message"),
    [
        ([["a"], ["a", "b"]], [[True], [True, False]], 2, "problem 0 has n = 1 samples: k = 2"),
        ([["a", "a"]], [[True, False]], 1, "the answer 'a' is judged both correct and wrong"),
        ([["a", None]], [[True, True]], 1, "a sample without an answer is judged correct"),
        ([["a", "b"]], [[True]], 1, "problem 0: 2 samples, 1 verdicts"),
        ([["a"]], [], 1, "answers to 1 problems, verdicts on 0"),
    ],
)
def test_ballots_that_make_no_sense_name_the_problem(answers, correct, k, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(answers, correct, k)


def test_messages_use_the_names_of_problems():
    with pytest.raises(ValueError, match='problem "gsm8k/7" has n = 1'):
        majority_at_k([["a"]], [[True]], 2, names=["gsm8k/7"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.5, 2.0, np.inf, -np.inf]), st.booleans()), min_size=1, max_size=8), st.data()
)
def test_best_equals_the_mean_over_all_subsets(judged, data):
    k = data.draw(st.integers(1, len(judged)))
    scores, correct = zip(*judged, strict=True)
    assert best_at_k([scores], [correct], k)[0] == pytest.approx(best_over_subsets(scores, correct, k), abs=1e-12)


def test_scores_that_know_the_truth_give_pass_at_k():
    correct = np.random.default_rng(2).random((20, 64)) < 0.1
    assert best_at_k(correct.astype(float), correct, 16) == pytest.approx(pass_at_k(64, correct.sum(axis=1), 16), abs=1e-12)


def test_a_score_that_is_nan_names_its_sample():
    with pytest.raises(ValueError, match="problem 1: the score of sample 2 is NaN"):
        best_at_k([[1.0], [0.0, 1.0, float("nan")]], [[True], [True, True, True]], 1)
