"""What selected features gain over scale alone: as published, and honestly, side by side."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from scaling_meta.inference import Estimate, Test, family_permutation, nadeau_bengio, paired_t_test, relative_gain
from scaling_meta.schema import SCALING
from scaling_meta.selection import PUBLISHED, FeatureSet, NestedSelection, Search, Selection, nested_errors
from scaling_meta.table import Table


@dataclass(frozen=True)
class PublishedGain:
    """The paper's numbers: mean absolute errors over seeds of the same models that the features were selected on.

    gain: 1 - after / before of each seed; its mean, and the t-interval that takes seeds as independent
    naive: the paper's paired t-test over seeds
    corrected: the same errors, fold by fold, by Nadeau and Bengio; it corrects for the overlap of folds, not for the selection
    """

    before: float
    after: float
    gain: Estimate
    naive: Test
    corrected: Test


@dataclass(frozen=True)
class HonestGain:
    """Mean absolute errors on models that the selection has not seen.

    gain: 1 - after / before, with an interval of resampled families
    family: whether the difference could come from chance, whole families exchanged
    corrected: Nadeau and Bengio's test over the splits; None for a single one
    """

    before: float
    after: float
    gain: Estimate
    family: Test
    corrected: Test | None


def published_gain(
    table: Table,
    y: Float64[np.ndarray, " models"],
    selection: Selection,
    seeds: int = 50,
    search: Search = PUBLISHED,
    start: FeatureSet = SCALING,
) -> PublishedGain:
    """Errors with `start` and with the selected features over `seeds` seeds, as in the paper's test of significance.

    A selection that added nothing gains nothing: both errors are the same.
    """
    from scipy.stats import t

    first, second = nested_errors(table, y, [start, selection.features], replace(search, seeds=seeds))
    gains = 1 - second.mean(1) / first.mean(1)
    half = float(t.ppf(0.975, seeds - 1) * gains.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else math.inf
    gain = float(gains.mean())
    return PublishedGain(
        before=float(first.mean()),
        after=float(second.mean()),
        gain=Estimate(gain, (gain - half, gain + half, 0.95)),
        naive=paired_t_test((first - second).mean(1)),
        corrected=nadeau_bengio((first - second).ravel(), (1 - 1 / search.folds) * (1 - search.set_aside), 1 / search.folds),
    )


def honest_gain(nested: NestedSelection, seed: int = 0) -> HonestGain:
    """Judge a selection that was made anew in each training set."""
    first, second = nested.start.model_errors, nested.selected.model_errors
    tested = ~np.isnan(first)
    families = [family for family, one in zip(nested.start.families, tested, strict=True) if one]
    before, after = float(first[tested].mean()), float(second[tested].mean())
    folds = nested.start.fold_errors - nested.selected.fold_errors
    return HonestGain(
        before=before,
        after=after,
        gain=relative_gain(first[tested], second[tested], families, seed=seed),
        family=family_permutation(first[tested], second[tested], families, seed=seed),
        corrected=nadeau_bengio(folds, nested.start.train, nested.start.test) if len(folds) > 1 else None,
    )
