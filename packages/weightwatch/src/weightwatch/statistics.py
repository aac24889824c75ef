"""How well inputs are told apart: rates and areas with intervals, and false alarms against the size of the calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from lmcore.errors import UserError
from weightwatch.bounds import Extremes
from weightwatch.planning import fpr_bound

Clean = Float[np.ndarray, " clean"]
HeldOut = Float32[np.ndarray, "held_out roles directions"]
Triggered = Float[np.ndarray, " triggered"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (low, high, level)."""

    value: float
    interval: tuple[float, float, float]


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Estimate:
    """The share of successes and its exact interval: the shares that a two-sided binomial test of 1 - level does not refuse.

    >>> clopper_pearson(0, 183)  # none of 183 clean inputs flagged: the false positive rate is below 2 %
    Estimate(value=0.0, interval=(0.0, 0.0199..., 0.95))

    Raises: `ValueError` unless 0 <= successes <= trials, with a trial.
    Source: Clopper and Pearson 1934.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials")
    return Estimate(successes / trials, _beta_interval(successes, trials, level))


def auroc(clean: Clean, triggered: Triggered, level: float = 0.95) -> Estimate:
    """P(triggered score > clean score) + P(equal) / 2, and its interval.

    The interval is DeLong's on the logit scale: the variance is that of the two samples' placements. Where scores separate perfectly, or
    are all equal, that variance is 0, which says nothing: the interval is then Clopper-Pearson's for min(m, n) independent pairs with
    this share in order (exact for perfect separation).

    >>> estimate = auroc(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.5, 0.6]))
    >>> round(estimate.value, 4), [round(end, 2) for end in estimate.interval]
    (0.875, [0.33, 0.99, 0.95])

    Infinite scores are fine. Raises: `UserError` for an empty sample or NaN.
    Source: DeLong, DeLong and Clarke-Pearson 1988 (variance).
    """
    from scipy.stats import norm

    _check(clean, triggered)
    m, n = len(clean), len(triggered)
    above = _placements(triggered, np.sort(clean))  # share of clean below each triggered score, ties half
    below = 1 - _placements(clean, np.sort(triggered))
    area = float(above.mean())
    variance = _variance(above) / n + _variance(below) / m
    if variance == 0 or area in (0.0, 1.0):
        return Estimate(area, _beta_interval(area * min(m, n), min(m, n), level))
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-end)) for end in (logit - half, logit + half))
    return Estimate(area, (low, high, level))


@dataclass(frozen=True)
class Detection:
    """Inputs are flagged above `threshold`; `fpr` is the share of clean inputs flagged, `tpr` that of triggered ones."""

    threshold: float
    fpr: float
    tpr: Estimate


def tpr_at_fpr(clean: Clean, triggered: Triggered, fpr: float, level: float = 0.95) -> Detection:
    """Rate of detection with the lowest threshold that flags at most a share `fpr` of the clean scores: their number floor(fpr m) + 1.

    The interval is Clopper-Pearson's over triggered inputs, with the threshold as given: clean scores that both set the threshold and
    speak for its false positives make `fpr` look better than it will be, so report another sample's.

    >>> tpr_at_fpr(np.arange(100.0), np.array([97.0, 98.5, 120.0]), 0.01)
    Detection(threshold=98.0, fpr=0.01, tpr=Estimate(value=0.66..., interval=(0.09..., 0.99..., 0.95)))

    Raises: `UserError` for an empty sample, NaN, or an fpr outside [0, 1).
    """
    _check(clean, triggered)
    if not 0 <= fpr < 1:
        raise UserError(f"fpr is {fpr}: it is a share from 0 to below 1")
    threshold = float(np.sort(clean)[::-1][math.floor(fpr * len(clean) + 1e-9)])
    found = clopper_pearson(int((triggered > threshold).sum()), len(triggered), level)
    return Detection(threshold, float((clean > threshold).mean()), found)


def fpr_curve(
    low: Extremes,
    high: Extremes,
    held_out_low: HeldOut,
    held_out_high: HeldOut,
    sizes: Sequence[int],
    *,
    epsilon: float = 0.0,
    repeats: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rate of false alarms of the min/max rule against the size n of the calibration, on held-out clean inputs.

    For each n: the mean over `repeats` subsets of n of the calibration inputs, drawn without replacement; `range` has the least and the
    greatest rate of a subset; `bound` is 2 t / (n + 1), summed over the roles that occur (the paper: the rate falls as 1/n).

    Raises: `UserError` for a size above the number of inputs.
    """
    if max(sizes) > len(low) or min(sizes) < 1:
        raise UserError(f"sizes {list(sizes)}: subsets of {len(low)} inputs have from 1 to {len(low)}")
    generator = np.random.default_rng(seed)
    roles = int((low < np.inf).any((0, 2)).sum())
    rows = []
    for size in sizes:
        rates = []
        for _ in range(repeats):
            subset = generator.permutation(len(low))[:size]
            least, greatest = low[subset].min(0) - epsilon, high[subset].max(0) + epsilon
            rates.append(float(((held_out_low < least) | (held_out_high > greatest)).any((1, 2)).mean()))
        bound = min(1.0, roles * fpr_bound(low.shape[2], size))
        rows.append({"inputs": size, "fpr": float(np.mean(rates)), "range": [min(rates), max(rates)], "bound": bound})
    return rows


def _beta_interval(successes: float, trials: int, level: float) -> tuple[float, float, float]:
    from scipy.stats import beta

    rest = (1 - level) / 2
    low = float(beta.ppf(rest, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - rest, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high, level


def _check(clean: np.ndarray, triggered: np.ndarray) -> None:
    for name, scores in (("clean", clean), ("triggered", triggered)):
        if not len(scores) or np.isnan(scores).any():
            raise UserError(
                f"{int(np.isnan(scores).sum())} of {len(scores)} {name} scores are NaN: need at least one score and no NaN"
            )


def _placements(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    return (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / (2 * len(others))


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25  # the largest that a share can have
