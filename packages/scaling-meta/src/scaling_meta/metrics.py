"""How well scores are predicted: errors, ranks, and decisions between two models."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64

Scores = Float64[np.ndarray, " models"]


def mae(y: Scores, predicted: Scores) -> float:
    """Mean absolute error, in units of the score."""
    return float(np.abs(predicted - y).mean())


def rmse(y: Scores, predicted: Scores) -> float:
    """Root of the mean squared error, in units of the score."""
    return float(np.sqrt(np.square(predicted - y).mean()))


def r2(y: Scores, predicted: Scores) -> float:
    """Share of the variance that is explained, 1 - sum (y - predicted)^2 / sum (y - mean)^2; NaN where the scores do not vary."""
    total = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(predicted - y).sum()) / total if total else float("nan")


def spearman(y: Scores, predicted: Scores) -> float:
    """Spearman's rank correlation, equal values with their mean rank; NaN where one side does not vary.

    >>> spearman(np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.4, 0.9]))
    0.5
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values) - (len(y) + 1) / 2 for values in (y, predicted)]
    length = float(np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum()))
    return float(ranks[0] @ ranks[1]) / length if length else float("nan")


def decision_accuracy(y: Scores, predicted: Scores, stderr: Scores | None = None) -> float:
    """Share of the pairs of models whose better one is predicted right; equal predictions are half right.

    Pairs with equal scores are not decisions and do not count. With `stderr`, neither do pairs whose scores are within the standard error
    of their difference, |y_i - y_j| <= sqrt(s_i^2 + s_j^2); an unknown (NaN) standard error is taken as 0. NaN where no pair counts.

    >>> decision_accuracy(np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.4, 0.9])).__round__(3)
    0.667
    >>> decision_accuracy(np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.4, 0.9]), np.full(3, 0.1))
    1.0

    Source: DataDecide, Magnusson et al. 2025, section 2 (without standard errors).
    """
    first, second = np.triu_indices(len(y), 1)
    gap = y[first] - y[second]
    noise = np.zeros(len(y)) if stderr is None else np.nan_to_num(stderr)
    counts = np.abs(gap) > np.hypot(noise[first], noise[second])
    agreement = np.sign(gap) * np.sign(predicted[first] - predicted[second])
    return float((1 + agreement[counts]).mean() / 2) if counts.any() else float("nan")


METRICS: Mapping[str, Callable[[Scores, Scores], float]] = {
    "mae": mae,
    "rmse": rmse,
    "r2": r2,
    "spearman": spearman,
    "decision_accuracy": decision_accuracy,
}
"""The metrics by name: of true and predicted scores."""
