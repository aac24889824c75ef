"""The sum of `majority`, compiled; it updates its two tables in place."""

import numpy as np
from numba import njit


@njit(cache=True)
def majority(votes, correct, abstentions, k):
    """See `wiseft.ops.majority`."""
    abstained = _binomials(abstentions, k)
    total = 0.0
    for top in range(1, min(k, votes.max() if len(votes) else 0) + 1):
        most_tied = min(k // top, np.count_nonzero(votes >= top))
        ways = np.zeros((k + 1, most_tied + 1))
        right = np.zeros((k + 1, most_tied + 1))
        ways[0, 0] = 1.0
        reach = 0
        for answer in range(len(votes)):
            choose = _binomials(votes[answer], top)
            reach = min(k, reach + min(votes[answer], top))
            # From the largest number of draws down, so that what a state reads still holds the answers before this one.
            for used in range(reach, -1, -1):
                for tied in range(most_tied, -1, -1):
                    new_ways = 0.0
                    new_right = 0.0
                    for v in range(min(votes[answer], top - 1, used) + 1):
                        new_ways += choose[v] * ways[used - v, tied]
                        new_right += choose[v] * right[used - v, tied]
                    if tied and used >= top and votes[answer] >= top:
                        before = ways[used - top, tied - 1]
                        new_ways += choose[top] * before
                        new_right += choose[top] * (right[used - top, tied - 1] + correct[answer] * before)
                    ways[used, tied] = new_ways
                    right[used, tied] = new_right
        for used in range(max(0, k - abstentions), k + 1):
            for tied in range(1, most_tied + 1):
                total += abstained[k - used] * right[used, tied] / tied
    return total / _binomials(votes.sum() + abstentions, k)[k]


@njit(cache=True)
def _binomials(n, most):
    """C(n, 0), ..., C(n, most)."""
    row = np.zeros(most + 1)
    row[0] = 1.0
    for v in range(min(n, most)):
        row[v + 1] = row[v] * (n - v) / (v + 1)
    return row
