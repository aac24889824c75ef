"""How many more samples, or problems, an interval of a given width needs."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from wiseft.passk import Cells, failure, log_choices, require_samples, sample_orders

_MOST_SAMPLES = 1 << 20  # per problem; log-gamma keeps nine digits up to here


@dataclass(frozen=True)
class Budget:
    """What a target width asks for at one k; the variances are those of one problem's estimate of Pass@k.

    `width` is the present one. `samples_per_problem` reaches the target with the present problems, and `more_samples` is
    what is still to be drawn for it in total; both are None where a million samples per problem would not do, or where some
    problem has fewer than 2k samples, so that the two parts of the variance are unknown too. `problems` reaches the target with
    the present samples per problem.
    """

    k: int
    width: float
    between_problems: float | None
    within_problems: float | None
    samples_per_problem: int | None
    more_samples: int | None
    problems: int
    advice: str

    def to_json(self) -> dict[str, Any]:
        """The budget as plain JSON values."""
        return dataclasses.asdict(self)


def samples_needed(
    samples: int | Sequence | np.ndarray,
    correct: int | Sequence | np.ndarray,
    ks: int | Sequence[int] | np.ndarray,
    *,
    width: float,
    level: float = 0.95,
) -> list[Budget]:
    """For each k, the samples per problem (or the problems) at which the interval of Pass@k is at most `width` wide.

    The width is taken as `2 z sqrt(V / problems)`. With u = 1 - ρ and m_i = E[u^i], estimated by the mean of
    `C(n-c, i) / C(n, i)`, a problem with n samples adds `V = B + W(n)`, between problems and within one:
    - `B = Var(u^k) = m_2k - (m_k)²`, which no number of samples changes;
    - `W(n) = sum over j = 1..k of C(k, j) C(n-k, k-j) / C(n, k) * (m_(2k-j) - m_2k)`, the variance of the U-statistic:
      two draws of k of the n samples share j of them with that probability.

    Every part is estimated without bias, which takes at least 2k samples per problem.

    >>> budget, = samples_needed(8, [0, 2, 4, 6, 8] * 20, ks=1, width=0.135)
    >>> budget.advice
    'draw 15 samples per problem (now 8) or use 107 problems (now 100)'

    Raises: `ValueError` as `pass_at_k`, for a width outside (0, 1), and with fewer than two problems.
    Source: Hoeffding 1948 (variance of U-statistics).
    """
    orders = sample_orders(ks)
    cells = Cells.of(samples, correct)
    require_samples(cells, orders)
    if not 0 < width < 1 or cells.problems.sum() < 2:
        raise ValueError(f"width is {width}, it must lie in (0, 1), and {cells.problems.sum()} problems must be at least 2")
    variance = (width / 2 / NormalDist().inv_cdf((1 + level) / 2)) ** 2
    return [_budget(cells, k, width, variance) for k in orders.tolist()]


def within_variance(n: int, k: int, moments: Float[np.ndarray, " orders"]) -> float:
    """`W(n)` of `samples_needed`; `moments` holds m_k, ..., m_2k and n is at least k."""
    log_all = log_choices(n, k)
    shared = np.zeros(k + 1)  # chance that two draws of k of the n samples share j
    for j in range(max(0, 2 * k - n), k + 1):
        shared[j] = math.exp(log_choices(k, j) + log_choices(n - k, k - j) - log_all)
    return float(shared @ (moments[::-1] - moments[-1]))


def _budget(cells: Cells, k: int, width: float, variance: float) -> Budget:
    """`variance` is the largest that the mean over problems may have."""
    problems, least = int(cells.problems.sum()), int(cells.samples.min())
    spread = float(np.cov(failure(cells, np.array([k]))[:, 0], fweights=cells.problems))
    wanted = max(2, math.ceil(spread / variance))
    found = Budget(
        k=k,
        width=width * math.sqrt(spread / problems / variance),
        between_problems=None,
        within_problems=None,
        samples_per_problem=None,
        more_samples=None,
        problems=wanted,
        advice=f"draw at least {2 * k} samples per problem to learn whether more samples suffice, or use {wanted} problems",
    )
    if least >= 2 * k:
        moments = cells.problems @ failure(cells, np.arange(k, 2 * k + 1)) / problems
        counts, place = np.unique(cells.samples, return_inverse=True)
        each = np.array([within_variance(n, k, moments) for n in counts.tolist()])
        within = float(np.average(each[place], weights=cells.problems))
        found = dataclasses.replace(
            found,
            between_problems=max(spread - within, 0.0),
            within_problems=within,
            advice=f"more samples cannot help, the problems differ too much: use {wanted} problems (now {problems})",
        )
        n = _fewest_samples(k, moments, problems * variance - max(spread - within, 0.0))
        if n is not None:
            found = dataclasses.replace(
                found,
                samples_per_problem=n,
                more_samples=int(cells.problems @ np.maximum(n - cells.samples, 0)),
                advice=f"draw {n} samples per problem (now {least}) or use {wanted} problems (now {problems})",
            )
    if found.width <= width:
        found = dataclasses.replace(found, advice="enough: the interval is narrow already")
    return found


def _fewest_samples(k: int, moments: Float[np.ndarray, " order"], within: float) -> int | None:
    """Smallest n with `W(n) <= within`, by bisection, since W falls with n; None if there is none to speak of."""
    if within_variance(_MOST_SAMPLES, k, moments) > within:
        return None
    low, high = k - 1, _MOST_SAMPLES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within_variance(middle, k, moments) <= within else (middle, high)
    return high
