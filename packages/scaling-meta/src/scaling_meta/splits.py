"""Which models are held out: random folds, whole families, later releases, the largest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from lmcore.errors import UserError
from scaling_meta.table import Table


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers to train on and to test on. Within a `repeat` no row is tested twice; `held_out` says what is tested."""

    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    held_out: str
    repeat: int = 0


def random_folds(rows: int, folds: int = 3, seeds: Sequence[int] = (0,), set_aside: float = 0.0) -> tuple[Split, ...]:
    """K folds of shuffled rows for each seed: scikit-learn's `KFold(folds, shuffle=True, random_state=seed)`, the paper's split.

    `set_aside` is the share of each training set that is drawn, by `train_test_split` with the same seed, and lost: the paper's code draws
    0.2 for an early stopping that it never does.

    >>> [split.test.tolist() for split in random_folds(5, folds=2)]
    [[0, 1, 2], [3, 4]]

    Raises: `UserError` if there are fewer rows than folds.
    """
    from sklearn.model_selection import KFold, train_test_split

    if rows < folds or folds < 2:
        raise UserError(f"{rows} models with a score cannot be divided into {folds} folds: add models or ask for fewer folds")
    found = []
    for repeat, seed in enumerate(seeds):
        for fold, (train, test) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(np.empty(rows)), 1):
            kept = train_test_split(train, test_size=set_aside, random_state=seed)[0] if set_aside else train
            found.append(Split(kept, test, f"seed {seed}, fold {fold}", repeat))
    return tuple(found)


def family_numbers(families: Sequence[str]) -> Int[np.ndarray, " models"]:
    """The number of each model's family, in the order of their names.

    >>> family_numbers(["Llama", "Pythia", "Llama"])
    array([0, 1, 0])
    """
    return np.unique(np.array(families, dtype=np.str_), return_inverse=True)[1]


def family_folds(families: Sequence[str]) -> tuple[Split, ...]:
    """Leave one family out, each in turn, in the order of their names.

    >>> [(split.held_out, split.test.tolist()) for split in family_folds(["Llama", "Pythia", "Llama"])]
    [('Llama', [0, 2]), ('Pythia', [1])]

    Raises: `UserError` if all models are of one family.
    """
    names, of_row = np.unique(np.array(families, dtype=np.str_), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"{len(families)} models of {len(names)} family cannot be divided by family: add models of another family"
        )
    return tuple(
        Split(np.flatnonzero(of_row != number), np.flatnonzero(of_row == number), str(name))
        for number, name in enumerate(names)
    )


def release_cutoffs(released: Sequence[str], shares: Sequence[float] = (0.5, 0.65, 0.8)) -> tuple[Split, ...]:
    """Train on models released before a month, test on those of that month and later; a repeat for each month.

    The months are those by which the given shares of the dated models were released. Models without a date ("") are in neither part.

    >>> [split.held_out for split in release_cutoffs(["2022-01", "2022-06", "2023-01", "", "2023-02"], [0.5])]
    ['from 2023-01']

    Raises: `UserError` if fewer than two months are known.
    """
    months = np.array(released, dtype=np.str_)
    dated = np.sort(months[months != ""])
    distinct = np.unique(dated)
    if len(distinct) < 2:
        raise UserError(f"{len(dated)} models have a release month, {len(distinct)} of them different: a cut-off needs two")
    at = [dated[min(int(share * len(dated)), len(dated) - 1)] for share in shares]
    cutoffs = sorted({str(max(month, distinct[1])) for month in at})
    return tuple(
        Split(np.flatnonzero((months != "") & (months < month)), np.flatnonzero(months >= month), f"from {month}", repeat)
        for repeat, month in enumerate(cutoffs)
    )


def largest(size: Float64[np.ndarray, " models"], models: int, held_out: str = "") -> tuple[Split, ...]:
    """Hold out the models that are largest by `size` (any measure): extrapolation. Equal ones: the later rows.

    >>> largest(np.array([7.0, 70.0, 13.0]), 1)[0].test.tolist()
    [1]

    Raises: `UserError` if none would be left to train on, or a size is unknown (NaN).
    """
    if not 0 < models < len(size) or np.isnan(size).any():
        missing = int(np.isnan(size).sum())
        raise UserError(f"the largest {models} of {len(size)} models ({missing} of unknown size) cannot be held out")
    order = np.argsort(size, kind="stable")
    return (Split(np.sort(order[:-models]), np.sort(order[-models:]), held_out or f"{models} largest"),)


def _top_compute(table: Table, seeds: Sequence[int]) -> tuple[Split, ...]:
    return largest(table.flops, math.ceil(0.2 * len(table)), "top 20 % by FLOPs")


SPLITS: Mapping[str, Callable[[Table, Sequence[int]], tuple[Split, ...]]] = {
    "random": lambda table, seeds: random_folds(len(table), seeds=seeds),
    "published": lambda table, seeds: random_folds(len(table), seeds=seeds, set_aside=0.2),
    "family": lambda table, seeds: family_folds(table.families),
    "release": lambda table, seeds: release_cutoffs(table.released),
    "largest": lambda table, seeds: largest(table.column("log_params"), 5, "5 largest by size"),
    "compute": _top_compute,
}
"""The splits by name, of a table and the seeds of the random ones: 3 random folds per seed, those with a fifth of each training set lost as
in the paper, leave-one-family-out, three release months, the 5 models largest by size as in the paper, the fifth with most compute."""
