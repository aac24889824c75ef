"""Choosing one of k samples: by a majority vote of their answers, or as the best of their scores."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from wiseft.ops.majority import majority
from wiseft.passk import Cells, failure, log_choices

_EXACT_WORK = 1e8  # multiplications, at most about 0.1 s: beyond this, drawing votes is cheaper than the exact sum
_EXACT_LOG = 700.0  # the exact sum holds C(n, k) as float64, which ends at exp(709)


@dataclass(frozen=True)
class VoteAccuracy:
    """Expected accuracy of the vote on each problem, and that number's standard error where votes were drawn (0 where exact)."""

    accuracy: Float[np.ndarray, " problems"]
    standard_error: Float[np.ndarray, " problems"]


def majority_at_k(
    answers: Sequence[Sequence[Hashable | None]],
    correct: Sequence[Sequence[bool]],
    k: int,
    *,
    names: Sequence[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> VoteAccuracy:
    """Expected accuracy of the majority vote of k of each problem's n samples, drawn without replacement.

    `answers` holds one sequence per problem with the final answer of each sample, and `correct` judges each. Equal answers vote
    together, and several answers may be correct. Tied answers win with equal chance. None is a sample without an answer: it takes
    up a draw but does not vote, and if none of the k has an answer the vote is wrong.

    Exact (`ops.majority`) where that takes at most about 0.1 s; elsewhere the mean over `draws` random choices of k samples, each
    of which counts the share of correct answers among the tied ones. `names` stand for the problems in messages.

    >>> vote = majority_at_k([["18", "18", "20"], ["7", None, "9"]], [[True, True, False], [False, False, True]], k=3)
    >>> vote.accuracy
    array([1. , 0.5])

    Raises: `ValueError` naming the problem where k > n, where lengths differ, where None is judged correct, or where equal
    answers are judged differently.
    Source: Wang et al. 2022, Self-Consistency (the vote).
    """
    if len(answers) != len(correct):
        raise ValueError(f"answers to {len(answers)} problems, verdicts on {len(correct)}")
    rng = np.random.default_rng(seed)
    accuracy, standard_error = np.empty(len(answers)), np.zeros(len(answers))
    for problem, (given, verdicts) in enumerate(zip(answers, correct, strict=True)):
        name = f'"{names[problem]}"' if names else str(problem)
        n = _samples(name, given, verdicts, k)
        votes, right = _ballot(name, given, verdicts)
        abstentions = n - int(votes.sum())
        if k == n:
            accuracy[problem] = _vote_shares(votes[None], right)[0]
        elif n * k**2 * (1 + math.log(k)) <= _EXACT_WORK and log_choices(n, k) <= _EXACT_LOG:
            accuracy[problem] = majority(votes, right, abstentions, k)
        else:
            chosen = rng.multivariate_hypergeometric(np.append(votes, abstentions), k, size=draws, method="count")
            shares = _vote_shares(chosen[:, :-1], right)
            accuracy[problem], standard_error[problem] = shares.mean(), shares.std() / math.sqrt(draws)
    return VoteAccuracy(accuracy, standard_error)


def best_at_k(
    scores: Sequence[Sequence[float]] | np.ndarray, correct: Sequence[Sequence[bool]] | np.ndarray, k: int
) -> Float[np.ndarray, " problems"]:
    """Unbiased accuracy of the sample with the highest score among k of each problem's n (Best@k, with a reward model's scores).

    Over all ways to choose k of n, the L-th smallest score is the highest chosen with chance `C(L-1, k-1) / C(n, k)`; equal scores are
    chosen with equal chance. With scores that know what is correct this is Pass@k.

    >>> best_at_k([[0.1, 0.7, 0.7, 0.2]], [[True, True, False, False]], k=2)  # the two 0.7 are the best of 5 in 6 choices
    array([0.41666667])

    Raises: `ValueError` naming the problem where k > n, where lengths differ or where a score is NaN.
    """
    if len(scores) != len(correct):
        raise ValueError(f"scores of {len(scores)} problems, verdicts on {len(correct)}")
    accuracy = np.empty(len(scores))
    highest: dict[int, np.ndarray] = {}
    for problem, (given, verdicts) in enumerate(zip(scores, correct, strict=True)):
        n = _samples(str(problem), given, verdicts, k)
        values = np.asarray(given, dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError(f"problem {problem}: the score of sample {int(np.isnan(values).argmax())} is NaN")
        if n not in highest:
            highest[n] = _highest_chance(n, k)
        _, tie, size = np.unique(values, return_inverse=True, return_counts=True)
        share = np.bincount(tie, weights=np.asarray(verdicts, dtype=bool)) / size
        accuracy[problem] = highest[n] @ np.repeat(share, size)
    return accuracy


def _samples(problem: str, given: Sequence | np.ndarray, verdicts: Sequence | np.ndarray, k: int) -> int:
    if len(given) != len(verdicts):
        raise ValueError(f"problem {problem}: {len(given)} samples, {len(verdicts)} verdicts")
    if not 1 <= k <= len(given):
        raise ValueError(f"problem {problem} has n = {len(given)} samples: k = {k} must lie in 1..n")
    return len(given)


def _ballot(
    problem: str, given: Sequence[Hashable | None], verdicts: Sequence[bool]
) -> tuple[Int[np.ndarray, " answers"], Bool[np.ndarray, " answers"]]:
    """Votes for each distinct answer and whether it is correct."""
    votes: dict[Hashable, int] = {}
    judged: dict[Hashable, bool] = {}
    for answer, verdict in zip(given, verdicts, strict=True):
        if answer is None:
            if verdict:
                raise ValueError(f"problem {problem}: a sample without an answer is judged correct")
            continue
        votes[answer] = votes.get(answer, 0) + 1
        if judged.setdefault(answer, bool(verdict)) != bool(verdict):
            raise ValueError(f"problem {problem}: the answer {answer!r} is judged both correct and wrong")
    return np.array(list(votes.values()), dtype=np.int64), np.array(list(judged.values()), dtype=bool)


def _vote_shares(votes: Int[np.ndarray, "draws answers"], right: Bool[np.ndarray, " answers"]) -> Float[np.ndarray, " draws"]:
    """The share of correct answers among those with the most votes; 0 where nobody votes."""
    most = votes.max(axis=1, initial=0, keepdims=True)
    tied = (votes == most) & (most > 0)
    return (tied & right).sum(axis=1) / np.maximum(tied.sum(axis=1), 1)


def _highest_chance(n: int, k: int) -> Float[np.ndarray, " samples"]:
    """Chance of each rank, lowest first, to be the highest of k of n: `C(L-1, k-1) / C(n, k) = C(L, k) / C(n, k) * k / L`."""
    rank = np.arange(1, n + 1)
    cells = Cells.of(n, n - rank)
    return failure(cells, np.array([k]))[cells.index, 0] * k / rank
