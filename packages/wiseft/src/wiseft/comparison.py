"""Two models on the same problems: paired differences of Pass@k, bias and variance."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from wiseft.intervals import Estimate, Range, bootstrap
from wiseft.passk import Cells, require_samples, sample_orders
from wiseft.summary import Moments

_FLIPS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class PassAtKDifference(Estimate):
    """Pass@k of the first model minus that of the second; `p_value` is None where their numbers of samples differ."""

    k: int
    p_value: float | None


@dataclass(frozen=True)
class Comparison:
    """First model minus second over the same problems; `variance` is None where either variance is unknown."""

    problems: int
    pass_at_k: tuple[PassAtKDifference, ...]
    bias: Estimate
    variance: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return dataclasses.asdict(self)


def compare(
    first: tuple[Sequence | np.ndarray, Sequence | np.ndarray],
    second: tuple[Sequence | np.ndarray, Sequence | np.ndarray],
    ks: int | Sequence[int] | np.ndarray,
    *,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Differences between two models, each given as (samples, correct) over the same problems in the same order.

    Problems are resampled in pairs (`bootstrap` over the joint histogram of (n, c, n', c')), so how hard a problem is cancels out.
    The p-value is two-sided, of the sign-flip permutation test on per-problem differences: under its null hypothesis, every
    problem is solved by both models with the same probability, the two counts of a problem can be swapped. That holds only where both
    have the same number of samples.

    >>> paired = compare(([4] * 6, [4, 3, 3, 2, 4, 1]), ([4] * 6, [2, 1, 3, 0, 2, 0]), ks=[1])
    >>> round(paired.pass_at_k[0].value, 3)
    0.375

    Raises: `ValueError` as `pass_at_k`, and if the models do not have the same number of problems.
    """
    orders = sample_orders(ks)
    cells = [Cells.of(*counts) for counts in (first, second)]
    if cells[0].index.shape != cells[1].index.shape:
        raise ValueError(f"{cells[0].index.size} problems cannot be paired with {cells[1].index.size}")
    for one in cells:
        require_samples(one, orders)
    moments = [Moments(one, orders) for one in cells]
    has_variance = all(one.has_variance for one in moments)
    statistics = len(orders) + 1 + has_variance

    width = len(cells[1].samples)
    pair, problems = np.unique(cells[0].index * width + cells[1].index, return_counts=True)
    columns = [moments[0].columns[pair // width], moments[1].columns[pair % width]]

    def difference(mean: np.ndarray, total: int) -> np.ndarray:
        left, right = mean[..., : columns[0].shape[1]], mean[..., columns[0].shape[1] :]
        return moments[0].statistics(left, total)[..., :statistics] - moments[1].statistics(right, total)[..., :statistics]

    ranges: list[Range] = [(-1.0, 1.0)] * (len(orders) + 1) + [None] * has_variance
    found = bootstrap(
        np.concatenate(columns, axis=1),
        problems,
        difference,
        ranges,
        level=level,
        replicates=replicates,
        seed=seed,
    )
    same_samples = bool((cells[0].samples[pair // width] == cells[1].samples[pair % width]).all())
    gains = columns[1][:, : len(orders)] - columns[0][:, : len(orders)]  # the columns hold failures
    chances = sign_flip(gains, problems, replicates=replicates, seed=seed).tolist() if same_samples else [None] * len(orders)
    return Comparison(
        problems=int(problems.sum()),
        pass_at_k=tuple(
            PassAtKDifference(**vars(estimate), k=k, p_value=chance)
            for estimate, k, chance in zip(found, orders.tolist(), chances, strict=False)
        ),
        bias=found[len(orders)],
        variance=found[len(orders) + 1] if has_variance else None,
    )


def sign_flip(
    differences: Float[np.ndarray, "cells orders"], problems: Int[np.ndarray, " cells"], *, replicates: int, seed: int
) -> Float[np.ndarray, " orders"]:
    """Two-sided p-values of mean differences: the share of random sign flips whose mean is at least as far from 0.

    `(1 + flips as far) / (1 + replicates)`, so never 0. Flips of the `problems` that share a cell are one binomial draw.
    """
    rng = np.random.default_rng(seed)
    moved = differences.any(axis=1)
    differences, problems = differences[moved], problems[moved]
    observed = np.abs(problems @ differences)
    as_far = np.zeros(differences.shape[1])
    block = max(1, _FLIPS_AT_ONCE // max(1, len(problems)))
    for done in range(0, replicates, block):
        kept = rng.binomial(problems, 0.5, size=(min(block, replicates - done), len(problems)))
        flipped = np.abs((2 * kept - problems) @ differences)
        as_far += (flipped >= observed * (1 - 1e-9)).sum(axis=0)  # equal sums may differ in their last digits
    return (1 + as_far) / (1 + replicates)
