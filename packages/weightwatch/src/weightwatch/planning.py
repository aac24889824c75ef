"""How many inputs to calibrate on for a rate of false alarms."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmcore.errors import UserError


def calibration_size(alpha: float, *, confidence: float | None = None, slack: float = 0.5) -> int:
    """Least number n of scored inputs for conformal bounds at level `alpha`.

    Without `confidence`: ceil(1/alpha) - 1, from where on some input can be flagged at all, at a rate of at most alpha on average over
    calibrations. With it: the least n from which on the rate of the one calibration that is drawn is at most (1 + slack) alpha with this
    probability. Given the calibration the rate is Beta(k, n + 1 - k) distributed, k = floor(alpha (n + 1)) (exact for continuous scores).

    A `Calibration` scores half of its inputs: calibrate on about 2 n.

    >>> calibration_size(0.01), calibration_size(0.01, confidence=0.9), calibration_size(0.01, confidence=0.9, slack=0.2)
    (99, 700, 4203)

    Raises: `UserError` for an alpha or a confidence outside (0, 1) or a slack that is not positive.
    """
    if not (0 < alpha < 1 and (confidence is None or 0 < confidence < 1) and slack > 0):
        raise UserError(f"alpha {alpha:g} and confidence {confidence} must lie between 0 and 1, slack {slack:g} above 0")
    if confidence is None:
        return int(_first_size(alpha, 1))
    # While k is the same, a larger n lowers the rate. So from n on all is well if n is, and so is the first size of each larger k.
    enough = 1
    while _probability(alpha, slack, _first_size(alpha, enough)) < confidence:
        enough *= 2
    first_sizes = _first_size(alpha, np.arange(2 * enough + 1))
    last_bad = int(np.flatnonzero(_probability(alpha, slack, first_sizes) < confidence)[-1])
    sizes = np.arange(first_sizes[last_bad], first_sizes[last_bad + 1] + 1)
    return int(sizes[_probability(alpha, slack, sizes) >= confidence][0])


def fpr_bound(directions: int, inputs: int) -> float:
    """The paper's bound for the min/max rule with t directions in one role and n inputs: 2 t / (n + 1), at most 1.

    The paper's 2t/n counts the input that is judged in n (Remark 3.1). For two roles that every input has it is twice that.

    >>> round(fpr_bound(1160, 50_000), 4)
    0.0464
    """
    return min(1.0, 2 * directions / (inputs + 1))


def plan(directions: int, alphas: Sequence[float] = (0.05, 0.02, 0.01, 0.001), *, confidence: float = 0.9,
         slack: float = 0.5) -> list[dict[str, Any]]:  # fmt: skip
    """One row per alpha: how many inputs to calibrate on.

    "on average": conformal bounds whose rate of false alarms is at most alpha on average over calibrations. "1.5 alpha with 90%": the
    rate of the one that is drawn is at most 1.5 alpha (1 + `slack`) with probability 0.9. Both count the two halves of a calibration.
    "min/max": its bound reaches alpha, in one role: 2 t / alpha - 1.

    >>> plan(1160, [0.02])
    [{'alpha': 0.02, 'on average': 98, '1.5 alpha with 90%': 616, 'min/max': 115999}]
    """
    return [
        {
            "alpha": alpha,
            "on average": 2 * calibration_size(alpha),
            f"{1 + slack:g} alpha with {confidence:.0%}": 2 * calibration_size(alpha, confidence=confidence, slack=slack),
            "min/max": math.ceil(2 * directions / alpha - 1e-9) - 1,
        }
        for alpha in alphas
    ]


def _first_size(alpha: float, rank: Any) -> Any:
    """Least n with floor(alpha (n + 1)) = rank."""
    return np.ceil(rank / alpha - 1e-9).astype(int) - 1


def _probability(alpha: float, slack: float, size: Any) -> Any:
    """P(rate <= (1 + slack) alpha) for n scored inputs; 0 where n is too small to flag any."""
    from scipy.stats import beta

    rank = np.floor(alpha * (size + 1) + 1e-9)
    return np.where(rank < 1, 0.0, beta.cdf((1 + slack) * alpha, np.maximum(rank, 1), size + 1 - np.maximum(rank, 1)))
