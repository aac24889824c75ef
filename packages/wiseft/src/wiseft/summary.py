"""Pass@k, bias and variance of Pass@1, and the bound they put on Pass@k, with intervals over problems."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from wiseft.intervals import Estimate, Range, bootstrap
from wiseft.passk import Cells, failure, require_samples, sample_orders


@dataclass(frozen=True)
class PassAtK(Estimate):
    """Pass@k; `upper_bound` is `1 - (bias² + variance)^(k/2)`, None for k = 1 or where a problem has a single sample."""

    k: int
    upper_bound: float | None


@dataclass(frozen=True)
class Histogram:
    """Problems by their Pass@1, c/n: bin i is [edges[i], edges[i+1]), the last one closed."""

    edges: tuple[float, ...]
    problems: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """What `summarize` found; the variances are None with fewer than three problems or where one has a single sample."""

    problems: int
    samples: int
    samples_per_problem: tuple[int, int]
    pass_at_k: tuple[PassAtK, ...]
    bias: Estimate
    variance: Estimate | None
    naive_variance: float | None
    histogram: Histogram

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return dataclasses.asdict(self)


def summarize(
    samples: int | Sequence | np.ndarray,
    correct: int | Sequence | np.ndarray,
    ks: int | Sequence[int] | np.ndarray,
    *,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Summary:
    """Estimate, over the distribution of problems, Pass@k for each k and the bias and variance of Pass@1.

    With ρ a problem's Pass@1, n its samples and c the correct ones, all without bias and for ragged n:
    - Pass@k: mean of `1 - C(n-c, k) / C(n, k)`;
    - bias `1 - E[ρ]`: 1 - mean of c/n;
    - variance `Var(ρ)`: mean of `c(c-1) / (n(n-1))`, which estimates E[ρ²], less the mean of `c/n * c'/n'` over pairs of different
      problems, which estimates (E[ρ])². It may come out slightly negative. `naive_variance`, the sample variance of c/n, is
      too large by E[ρ(1-ρ)/n] and stands beside it for comparison;
    - upper bound `E[Pass@k] <= 1 - (bias² + variance)^(k/2)` for k >= 2 (Jensen; an equality at k = 2), where
      `bias² + variance = E[(1-ρ)²]` is estimated as one number, the mean of `C(n-c, 2) / C(n, 2)`.

    Intervals are `bootstrap` intervals over problems, so they speak of new problems as well as of new samples. The same seed gives
    the same intervals.

    >>> summary = summarize(samples=[4, 4, 4, 4], correct=[0, 1, 2, 4], ks=[1, 2])
    >>> [(row.k, round(row.value, 4)) for row in summary.pass_at_k]
    [(1, 0.4375), (2, 0.5833)]

    Raises: `ValueError` as `pass_at_k` and `bootstrap` do.
    Source: Dang et al. 2025 (bias, variance and bound); Chen et al. 2021 (Pass@k).
    """
    orders = sample_orders(ks)
    cells = Cells.of(samples, correct)
    require_samples(cells, orders)
    moments = Moments(cells, orders)
    found = bootstrap(
        moments.columns, cells.problems, moments.statistics, moments.ranges, level=level, replicates=replicates, seed=seed
    )
    variance = found[-1] if moments.has_variance else None
    return Summary(
        problems=moments.problems,
        samples=int(cells.problems @ cells.samples),
        samples_per_problem=(int(cells.samples.min()), int(cells.samples.max())),
        pass_at_k=tuple(
            PassAtK(**vars(estimate), k=k, upper_bound=bound)
            for estimate, k, bound in zip(found[: len(orders)], orders.tolist(), _upper_bounds(cells, orders), strict=True)
        ),
        bias=found[len(orders)],
        variance=variance,
        naive_variance=float(np.cov(cells.correct / cells.samples, fweights=cells.problems)) if variance else None,
        histogram=_histogram(cells),
    )


class Moments:
    """Columns whose means over problems determine Pass@k, bias and variance; `ranges` are those of the statistics.

    The statistics stand in the order Pass@k for each k, bias, variance. The variance is left out where it cannot be estimated.
    """

    def __init__(self, cells: Cells, orders: Int[np.ndarray, " orders"]):
        n, c = cells.samples, cells.correct
        self.problems = int(cells.problems.sum())
        self.orders = len(orders)
        # With two problems, the jackknife leaves one, and one problem has no variance.
        self.has_variance = bool(self.problems >= 3 and n.min() >= 2)
        self.ranges: list[Range] = [(0.0, 1.0)] * (self.orders + 1)
        columns = [failure(cells, orders), (c / n)[:, None]]
        if self.has_variance:
            columns += [((c / n) ** 2)[:, None], (c * (c - 1) / (n * (n - 1)))[:, None]]
            self.ranges.append(None)
        self.columns: Float[np.ndarray, "cells columns"] = np.concatenate(columns, axis=1)

    def statistics(self, mean: Float[np.ndarray, "*batch columns"], problems: int) -> Float[np.ndarray, "*batch statistics"]:
        """Pass@k, bias and variance from the means of the columns over so many problems."""
        fail, rate = mean[..., : self.orders], mean[..., self.orders : self.orders + 1]
        if not self.has_variance:
            return np.concatenate([1 - fail, 1 - rate], axis=-1)
        rate_squared, rho_squared = mean[..., [self.orders + 1]], mean[..., [self.orders + 2]]
        squared_mean = (problems * rate**2 - rate_squared) / (problems - 1)
        return np.concatenate([1 - fail, 1 - rate, rho_squared - squared_mean], axis=-1)


def _upper_bounds(cells: Cells, orders: Int[np.ndarray, " orders"]) -> list[float | None]:
    if cells.samples.min() < 2:
        return [None] * len(orders)
    second_moment = float(np.average(failure(cells, np.array([2]))[:, 0], weights=cells.problems))
    return [1 - second_moment ** (k / 2) if k >= 2 else None for k in orders.tolist()]


def _histogram(cells: Cells, most_bins: int = 20) -> Histogram:
    """At most n + 1 bins for the smallest n, so that none stays empty only because c/n cannot fall into it."""
    bins = min(most_bins, int(cells.samples.min()) + 1)
    place = np.minimum(cells.correct * bins // cells.samples, bins - 1)
    counted = np.bincount(place, weights=cells.problems, minlength=bins)
    return Histogram(tuple(i / bins for i in range(bins + 1)), tuple(int(count) for count in counted))
