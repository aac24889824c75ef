"""The majority vote of k of a problem's samples, over all ways to choose them."""

import numpy as np
from jaxtyping import Bool, Int

from lmcore.dispatch import pick


def majority(votes: Int[np.ndarray, " answers"], correct: Bool[np.ndarray, " answers"], abstentions: int, k: int) -> float:
    """Chance that the most frequent answer among k of n samples, drawn without replacement, is correct.

    `votes` counts the samples of each distinct answer and `correct` judges the answer; `abstentions` counts samples without an
    answer, which take up draws but do not vote. Tied answers win with equal chance, and without a vote nothing wins. With a_i
    the votes of answer i, T the set of answers that reach the most votes t, and [x^k] the coefficient of x^k:

        1 / C(n, k) * sum over t and T of  (correct in T) / |T|
            * [x^k] (1 + x)^abstentions * prod over T of C(a_i, t) x^t * prod over the rest of sum over v < t of C(a_i, v) x^v

    A dynamic program over the answers, with states (draws used, answers at t), takes at most about `n k² log k` multiplications
    for the sum. All terms are positive, so its relative error is about n times the rounding of float64.

    >>> majority(np.array([2, 1]), np.array([True, False]), abstentions=0, k=2)  # {a, a} wins, {a, b} ties twice
    0.6666666666666666

    Raises: `ValueError` if k is not in 1..n, or if `C(n, k)` exceeds float64.
    """
    n = int(votes.sum()) + abstentions
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} of n = {n} samples: it must lie in 1..n")
    return pick(__name__).majority(votes, correct, abstentions, k)
