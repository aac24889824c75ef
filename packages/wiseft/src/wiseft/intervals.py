"""Confidence intervals of statistics over problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

_NORMAL = NormalDist()
_DRAWS_AT_ONCE = 1 << 22  # bounds the memory of the resampled histograms: 32 MiB

Statistic = Callable[[np.ndarray, int], np.ndarray]
"""Maps the means of columns over problems, [..., columns], and the number of problems to statistics, [..., statistics]."""

Range = tuple[float, float] | None
"""Least and largest contribution of one problem to a statistic that is a mean over problems; None for other statistics."""


@dataclass(frozen=True)
class Estimate:
    """A number over problems. `interval` is (low, high, level), None where nothing shows how the problems vary."""

    value: float
    standard_error: float
    interval: tuple[float, float, float] | None


def bootstrap(
    values: Float[np.ndarray, "cells columns"],
    problems: Int[np.ndarray, " cells"],
    statistic: Statistic,
    ranges: Sequence[Range],
    *,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> list[Estimate]:
    """Accelerated bootstrap intervals (BCa with z0 = a) of each statistic, resampling problems.

    `problems` counts the problems of each cell, and `values` holds what a problem of that cell adds to each column. Problems of
    one cell are interchangeable, so a replicate is one multinomial draw of the histogram: its cost does not depend on how many
    problems there are. Standard errors are the jackknife's (of a mean: s / sqrt(problems)).

    The quantiles that end an interval are shifted for skewness: a is the jackknife's acceleration. The bias correction z0 equals a
    for a mean, to the order of the method; counting replicates below the estimate instead goes wrong for a variance near its
    largest value, whose replicates all lie below. With fewer than a few hundred problems, the interval of a variance is somewhat
    short where a few problems carry most of it.

    Where all problems agree on a statistic, resampling cannot move it: its interval is the `unanimous_interval` for its range.
    Raises: `ValueError` if there are no problems, or for a level outside (0, 1) or no replicates.
    Source: Efron 1987, Better Bootstrap Confidence Intervals (z0, a and the interval).
    """
    total = int(problems.sum())
    if total == 0 or not 0 < level < 1 or replicates < 1:
        raise ValueError(f"bootstrap of {total} problems at level {level} with {replicates} replicates")
    share = problems / total
    mean = share @ values
    estimate = statistic(mean, total)

    def unanimous(i: int) -> Estimate:
        return Estimate(float(estimate[i]), 0.0, unanimous_interval(float(estimate[i]), total, level, ranges[i]))

    if len(values) == 1:
        return [unanimous(i) for i in range(len(estimate))]

    without_one = statistic((total * mean - values) / (total - 1), total - 1)
    influence = share @ without_one - without_one
    squares, cubes = total * (share @ influence**2), total * (share @ influence**3)
    replicated = _resample(values, share, statistic, total, replicates, np.random.default_rng(seed))
    found = []
    for i, drawn in enumerate(replicated.T):
        if np.ptp(drawn) < 1e-12:  # rounding, not spread
            found.append(unanimous(i))
            continue
        # A variance at its largest, say, responds to no single problem to first order, and then has no skewness either.
        acceleration = cubes[i] / (6 * squares[i] ** 1.5) if squares[i] > 1e-24 else 0.0
        low, high = np.quantile(drawn, _quantile_levels(float(acceleration), level))
        error = float(np.sqrt(squares[i] * (total - 1) / total))
        found.append(Estimate(float(estimate[i]), error, (float(low), float(high), level)))
    return found


def mean_over_problems(
    values: Float[np.ndarray, "problems statistics"], *, level: float = 0.95, replicates: int = 10_000, seed: int = 0
) -> list[Estimate]:
    """`bootstrap` intervals of the means of values in [0, 1], one row per problem."""
    cells, problems = np.unique(values, axis=0, return_counts=True)
    ranges: list[Range] = [(0.0, 1.0)] * values.shape[1]
    return bootstrap(cells, problems, lambda mean, _: mean, ranges, level=level, replicates=replicates, seed=seed)


def unanimous_interval(value: float, problems: int, level: float, contributions: Range) -> tuple[float, float, float] | None:
    """Exact interval of a mean over problems, each contributing within a known range, where all contributed `value`.

    Had a share f of the population contributed otherwise, this sample would have had the chance `(1 - f)^problems`. That is
    `(1 - level) / 2` or more only for `f <= 1 - ((1 - level) / 2)^(1 / problems)`, and that share can lie anywhere in the range.

    >>> low, high, _ = unanimous_interval(1.0, problems=100, level=0.95, contributions=(0.0, 1.0))
    >>> round(low, 3), high
    (0.964, 1.0)
    """
    if contributions is None:
        return None
    alike = ((1 - level) / 2) ** (1 / problems)
    least, largest = contributions
    return alike * value + (1 - alike) * least, alike * value + (1 - alike) * largest, level


def _resample(
    values: np.ndarray, share: np.ndarray, statistic: Statistic, total: int, replicates: int, rng: np.random.Generator
) -> Float[np.ndarray, "replicates statistics"]:
    block = max(1, _DRAWS_AT_ONCE // len(values))
    blocks = []
    for done in range(0, replicates, block):
        histograms = rng.multinomial(total, share, size=min(block, replicates - done))
        blocks.append(statistic(histograms @ values / total, total))
    return np.concatenate(blocks)


def _quantile_levels(acceleration: float, level: float) -> list[float]:
    """The quantiles of the replicates that end the interval, as Efron has them, with z0 = a."""
    levels = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = acceleration + _NORMAL.inv_cdf(tail)
        levels.append(_NORMAL.cdf(acceleration + shifted / (1 - acceleration * shifted)))
    return levels
