"""Evaluation noise: a score is a mean over a finite number of questions, so that no design predicts it exactly."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from scaling_meta.database import Scores

ITEMS: Mapping[str, int] = {
    "arc_challenge": 1172, "hellaswag": 10042, "mmlu_0shot": 14042, "mmlu_5shot": 14042, "truthfulqa": 817, "winogrande": 1267,
    "lambada": 5153, "gsm8k": 1319, "humaneval": 164,
}  # fmt: skip
"""How many items the accuracies are over (test or validation split as lm-evaluation-harness takes it)."""


@dataclass(frozen=True)
class Noise:
    """What evaluation noise does to the scores of one benchmark.

    stderr: root mean square of the known standard errors; `known` is the share of models they are known of
    floor: the mean absolute error of a perfect prediction, sqrt(2 / pi) times the mean standard error
    share: of the mean squared residual, the part that the mean squared standard error makes; above 1 if the fit is closer than noise allows
    """

    known: float
    stderr: float
    floor: float
    share: float


def standard_errors(task: str, scores: Scores) -> Float64[np.ndarray, " models"]:
    """The standard errors of the database; where there is none, or 0, the binomial one if the number of items is known, else NaN.

    sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2): a model that solves none of n tasks may still solve one in n.

    >>> standard_errors("humaneval", Scores(np.array([0.0, 0.5, 0.5]), np.array([0.0, np.nan, 0.03]))).round(4)
    array([0.006, 0.039, 0.03 ])
    >>> standard_errors("xnli", Scores(np.array([0.6]), np.array([np.nan])))
    array([nan])
    """
    n = ITEMS.get(task)
    known = np.where(scores.stderr > 0, scores.stderr, np.nan)
    if n is None:
        return known
    p = (scores.values * n + 1) / (n + 2)
    return np.where(np.isnan(known), np.sqrt(p * (1 - p) / n), known)


def noise(stderr: Float64[np.ndarray, " models"], residuals: Float64[np.ndarray, " models"]) -> Noise | None:
    """The noise of scores whose errors of prediction are `residuals`, from the models with both; None if there is none.

    >>> found = noise(np.array([0.01, 0.01, np.nan]), np.array([0.02, -0.02, 0.5]))
    >>> round(found.floor, 4), round(found.share, 2), round(found.known, 2)
    (0.008, 0.25, 0.67)
    """
    both = ~np.isnan(stderr + residuals)
    if not both.any():
        return None
    variance, error = np.square(stderr[both]).mean(), np.square(residuals[both]).mean()
    share = float(variance / error) if error else math.inf
    return Noise(float(both.mean()), math.sqrt(variance), math.sqrt(2 / math.pi) * float(stderr[both].mean()), share)


def weights(
    stderr: Float64[np.ndarray, " models"], residuals: Float64[np.ndarray, " models"]
) -> Float64[np.ndarray, " models"]:
    """Weights for fitting, in proportion to 1 / (t^2 + stderr^2), with mean 1.

    t^2 is the variance that noise does not explain, mean(residual^2 - stderr^2), at least 0: where it is large, all models count the same.
    An unknown standard error is taken as the root mean square of the known ones. All 1 where none is known.
    """
    known = stderr[~np.isnan(stderr)]
    if not len(known):
        return np.ones(len(stderr))
    variance = np.where(np.isnan(stderr), np.square(known).mean(), np.square(stderr))
    own = max(0.0, float((np.square(residuals) - variance).mean()))
    raw = 1 / (own + variance)
    return raw / raw.mean()
