"""Whether one regressor predicts better than another: tests and intervals that know what is independent.

The errors of the same models over many random splits are not independent samples, nor are models of one family.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from scaling_meta.splits import family_numbers

Differences = Float64[np.ndarray, " splits"]
Errors = Float64[np.ndarray, " models"]

_EXACT = 14  # families up to which all 2^families sign patterns are listed


@dataclass(frozen=True)
class Test:
    """A mean difference, and how often one as large in size (either sign) would come from nothing."""

    __test__ = False  # not one of pytest's

    difference: float
    statistic: float
    p: float


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (low, high, level)."""

    value: float
    interval: tuple[float, float, float]


def paired_t_test(differences: Differences) -> Test:
    """The t-test that takes all splits as independent samples, t = mean / sqrt(s^2 / J) with J - 1 degrees of freedom.

    The paper's, over the seeds of the splits. They are splits of the same models, so p goes to 0 as seeds are added, whatever is true:
    it stands beside `nadeau_bengio` to show the difference.
    """
    return _t_test(differences, 1 / len(differences))


def nadeau_bengio(differences: Differences, train: float, test: float) -> Test:
    """The corrected resampled t-test: t = mean / sqrt((1/J + test/train) s^2) with J - 1 degrees of freedom.

    `differences` are errors of one regressor minus those of the other, one for each of J splits with `train` and `test` models (for r
    repeats of k folds: J = r k and test/train = 1/(k - 1)). The second term stands for the overlap of the training sets.

    >>> nadeau_bengio(np.array([0.01, 0.02, 0.03, 0.02]), train=60, test=30)
    Test(difference=0.02, statistic=2.828..., p=0.066...)

    Source: Nadeau and Bengio 2003, section 3; Bouckaert and Frank 2004 for repeated folds.
    """
    return _t_test(differences, 1 / len(differences) + test / train)


def family_permutation(first: Errors, second: Errors, families: Sequence[str], permutations: int = 9999, seed: int = 0) -> Test:
    """The difference of the mean errors against those when whole families swap the two regressors.

    If both predict equally well, the sign of a family's summed difference is a coin. All 2^families patterns up to 14 families, else
    `permutations` random ones, with p = (1 + those as extreme) / (1 + permutations), which is never 0.

    >>> family_permutation(np.array([0.3, 0.2, 0.4]), np.array([0.1, 0.1, 0.1]), ["A", "A", "B"]).p  # of ++, +-, -+, --
    0.5

    Source: sign-flip (randomisation) test, Fisher 1935; families as the units that may be exchanged.
    """
    sums = _by_family(first - second, families)
    observed = float(sums.sum())
    if len(sums) <= _EXACT:
        signs = np.array([*itertools.product((1.0, -1.0), repeat=len(sums))])
        extreme, patterns = _as_extreme(signs @ sums, observed), len(signs)
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (permutations, len(sums)))
        extreme, patterns = 1 + _as_extreme(signs @ sums, observed), 1 + permutations
    return Test(observed / len(first), observed, extreme / patterns)


def benjamini_hochberg(p: Float64[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    """Adjusted p-values: refusing those below q keeps the expected share of wrong ones among the refused below q.

    q_(i) = min over j >= i of p_(j) m / j, for p in rising order.

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03])).round(3)
    array([0.03, 0.04, 0.04])

    Source: Benjamini and Hochberg 1995.
    """
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.minimum(adjusted, 1.0)


def relative_gain(
    first: Errors, second: Errors, families: Sequence[str], resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """How much smaller the second errors are, 1 - mean second / mean first, with an interval from resampled families.

    Percentiles over `resamples` draws of as many families as there are, with replacement: models of one family come and go together.
    """
    sums = np.stack([_by_family(first, families), _by_family(second, families)])
    drawn = np.random.default_rng(seed).multinomial(sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), resamples)
    before, after = sums @ drawn.T
    known = before > 0  # a draw of perfectly predicted families has no relative gain
    low, high = np.quantile(1 - after[known] / before[known], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(1 - float(second.sum() / first.sum()), (float(low), float(high), level))


def _t_test(differences: Differences, factor: float) -> Test:
    from scipy.stats import t

    mean, variance = float(differences.mean()), float(differences.var(ddof=1))
    if variance == 0:
        return Test(mean, math.copysign(math.inf, mean) if mean else 0.0, 0.0 if mean else 1.0)
    statistic = mean / math.sqrt(factor * variance)
    return Test(mean, statistic, float(2 * t.sf(abs(statistic), len(differences) - 1)))


def _by_family(values: Errors, families: Sequence[str]) -> Float64[np.ndarray, " families"]:
    return np.bincount(family_numbers(families), weights=values)


def _as_extreme(sums: np.ndarray, observed: float) -> int:
    return int((np.abs(sums) >= abs(observed) * (1 - 1e-12)).sum())  # the observed pattern counts itself, whatever the rounding
