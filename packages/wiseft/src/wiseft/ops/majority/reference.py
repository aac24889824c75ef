"""The sum of `majority` in whole numbers: the oracle of the compiled one."""

from math import comb

import numpy as np


def majority(votes: np.ndarray, correct: np.ndarray, abstentions: int, k: int) -> float:
    """See `wiseft.ops.majority`."""
    total = 0.0
    for top in range(1, min(k, max(votes.tolist(), default=0)) + 1):
        # Choices of samples by (draws used, answers with `top` votes), and over those choices how many such answers are correct.
        ways = {(0, 0): 1}
        right = {(0, 0): 0}
        for count, good in zip(votes.tolist(), correct.tolist(), strict=True):
            next_ways: dict[tuple[int, int], int] = {}
            next_right: dict[tuple[int, int], int] = {}
            for (used, tied), choices in ways.items():
                for v in range(min(count, top, k - used) + 1):
                    state = used + v, tied + (v == top)
                    credit = right[used, tied] + choices * (good and v == top)
                    next_ways[state] = next_ways.get(state, 0) + comb(count, v) * choices
                    next_right[state] = next_right.get(state, 0) + comb(count, v) * credit
            ways, right = next_ways, next_right
        for (used, tied), credit in right.items():
            if tied:
                total += comb(abstentions, k - used) * credit / tied / comb(int(votes.sum()) + abstentions, k)
    return total
