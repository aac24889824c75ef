"""Unbiased Pass@k from how many of a problem's samples are correct."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_TABLE_NUMBERS = 1 << 22  # bounds the memory of a table of failures: 32 MiB, or one column where that is longer
_MOST = (1 << 31) - 1  # the product of two counts must fit in int64


def pass_at_k(
    samples: int | Sequence | np.ndarray, correct: int | Sequence | np.ndarray, k: int | Sequence[int] | np.ndarray
) -> Float[np.ndarray, "..."]:
    """Unbiased estimate of the chance that at least one of k samples is correct: `1 - C(n-c, k) / C(n, k)`.

    `samples` (n) and `correct` (c) are integers, one per problem, and broadcast against each other. The result, float64, has
    their shape for one k, and one more axis at the end for a sequence of them. Off by less than 1e-12 for n up to 10,000.

    >>> pass_at_k(4, [0, 1, 4], 2)
    array([0. , 0.5, 1. ])
    >>> pass_at_k([4, 8], [1, 1], [1, 2]).shape
    (2, 2)

    Costs, per distinct n, one product over the largest c for each k, and then one look-up per estimate.
    Raises: `ValueError` naming the first problem with a negative or fractional count or one of 2^31 or more, with c > n, or with n < k.
    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, eq. 1.
    """
    orders = sample_orders(k)
    cells = Cells.of(samples, correct)
    require_samples(cells, orders)
    estimates = (1 - failure(cells, orders))[cells.index]
    return estimates[..., 0] if np.ndim(k) == 0 else estimates


class Cells:
    """Problems grouped by their pair (n, c): all that an estimate needs, however many problems there are.

    `samples` and `correct` are the pairs, `problems` counts the problems of each, and `index` holds each problem's cell in the
    shape of the input.
    """

    def __init__(self, samples: Int[np.ndarray, " cells"], correct: Int[np.ndarray, " cells"], index: Int[np.ndarray, "..."]):
        self.samples, self.correct, self.index = samples, correct, index
        self.problems: Int[np.ndarray, " cells"] = np.bincount(index.ravel(), minlength=len(samples))

    @classmethod
    def of(cls, samples: int | Sequence | np.ndarray, correct: int | Sequence | np.ndarray) -> "Cells":
        """Group problems; `ValueError` names the first whose counts make no sense."""
        n, c = np.broadcast_arrays(_integers(samples, "samples"), _integers(correct, "correct"))
        if (c > n).any():
            at = _first(c > n)
            raise ValueError(f"problem {at} has c = {c.ravel()[at]} correct of n = {n.ravel()[at]} samples")
        if n.size and n.min() == 0:
            raise ValueError(f"problem {_first(n == 0)} has no samples")
        side = int(n.max(initial=0)) + 1
        pair, index = _unique(np.asarray(n * side + c), side * side)
        return cls(pair // side, pair % side, index)


def failure(cells: Cells, orders: Int[np.ndarray, " orders"]) -> Float[np.ndarray, "cells orders"]:
    """Unbiased estimate of E[u^k] with u = 1 - Pass@1, the chance that k samples all fail: `C(n-c, k) / C(n, k)`, n >= k.

    As the product over i < c of `(n-k-i) / (n-i)`: every factor is rounded once and no factorial overflows.
    """
    result = np.empty((len(cells.samples), len(orders)))
    for n in np.unique(cells.samples):
        here = np.flatnonzero(cells.samples == n)
        correct = cells.correct[here]
        drawn = np.arange(correct.max())[:, None]
        width = max(1, _TABLE_NUMBERS // (len(drawn) + 1))
        for start in range(0, len(orders), width):
            some = slice(start, start + width)
            table = np.ones((len(drawn) + 1, len(orders[some])))
            np.cumprod(np.maximum(n - orders[some] - drawn, 0) / (n - drawn), axis=0, out=table[1:])
            result[here, some] = table[correct]
    return result


def sample_orders(k: int | Sequence[int] | np.ndarray) -> Int[np.ndarray, " orders"]:
    """The k of Pass@k as an array of integers of at least 1."""
    orders = np.atleast_1d(_integers(k, "k"))
    if (orders < 1).any():
        raise ValueError(f"k = {orders[orders < 1][0]}: it must be at least 1")
    return orders


def require_samples(cells: Cells, orders: Int[np.ndarray, " orders"]) -> None:
    """`ValueError` naming the first problem with fewer samples than the largest k."""
    most = orders.max(initial=0)
    if (cells.samples < most).any():
        samples = cells.samples[cells.index].ravel()
        at = _first(samples < most)
        raise ValueError(f"problem {at} has n = {samples[at]} samples, fewer than k = {most}")


def log_choices(n: int, k: int) -> float:
    """`log C(n, k)` in nats."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _integers(values: int | Sequence | np.ndarray, name: str) -> Int[np.ndarray, "..."]:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        fractional = array != np.floor(array)  # NaN too
        if fractional.any():
            at = _first(fractional)
            raise ValueError(f"{name}[{at}] is {array.ravel()[at]}: it must be an integer")
    elif array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.min() < 0:
        at = _first(array < 0)
        raise ValueError(f"{name}[{at}] is {array.ravel()[at]}: it must not be negative")
    if array.max() > _MOST:
        at = _first(array > _MOST)
        raise ValueError(f"{name}[{at}] is {array.ravel()[at]}: it must be below 2^31")
    return array.astype(np.int64, copy=False)


def _unique(keys: Int[np.ndarray, "..."], bound: int) -> tuple[Int[np.ndarray, " unique"], Int[np.ndarray, "..."]]:
    """`np.unique` with its inverse; keys below a small bound are counted instead of sorted."""
    if bound > max(1 << 20, 4 * keys.size):
        unique, index = np.unique(keys, return_inverse=True)
        return unique, index.reshape(keys.shape)
    unique = np.flatnonzero(np.bincount(keys.ravel(), minlength=1))
    place = np.empty(bound, np.int64)
    place[unique] = np.arange(len(unique))
    return unique, np.asarray(place[keys])


def _first(where: np.ndarray) -> int:
    return int(np.flatnonzero(where)[0])
