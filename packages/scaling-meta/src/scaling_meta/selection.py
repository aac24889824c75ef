"""Greedy forward selection of features: as published, without leakage, and how stable it is.

As published, features are chosen by their cross-validated error on all models and judged by that same error: the choice has seen every
test score. Without leakage the choice is made anew inside each training set, and judged on models that it has not seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from lmcore.errors import UserError
from scaling_meta.boosting import GRID, Boosted
from scaling_meta.crossval import CrossValidation, cross_validate
from scaling_meta.ops.bins import Bins, binned
from scaling_meta.ops.forests import held_out_errors
from scaling_meta.schema import SCALING
from scaling_meta.splits import Split, family_numbers, random_folds
from scaling_meta.table import Table

FeatureSet = tuple[str, ...]
Rows = Int[np.ndarray, " _"]

_FITS = 20_000  # forests per call of the kernel: bounds memory, and a call cannot be interrupted


@dataclass(frozen=True)
class Search:
    """How a set of features is judged on some models: the error of boosted trees in nested cross-validation, averaged over seeds.

    seeds: shufflings of the models into `folds` folds
    set_aside: share of each training set that is drawn and left out (the paper's code does so, for an early stopping that it never does)
    grid: settings (depth, learning rate, trees); of several, an inner cross-validation of as many folds chooses
    by_family: folds are of whole families, so that features are chosen that help with families not seen
    tolerance: a feature must lower the error by more than this
    """

    seeds: int = 5
    folds: int = 3
    set_aside: float = 0.0
    grid: tuple[tuple[int, float, int], ...] = ((3, 0.1, 100),)
    by_family: bool = False
    tolerance: float = 1e-4


PUBLISHED = Search(seeds=10, set_aside=0.2, grid=GRID)
"""The paper's: a grid of 18, a fifth of each training set left out."""


@dataclass(frozen=True)
class Step:
    """A feature that was taken, and the error before and after."""

    feature: str
    before: float
    after: float


@dataclass(frozen=True)
class Selection:
    """The features chosen, those it started from first, and how."""

    features: FeatureSet
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class NestedSelection:
    """What was chosen in the training set of each split, and the held-out predictions with it and with the start alone."""

    selections: tuple[Selection, ...]
    selected: CrossValidation
    start: CrossValidation


def forward(
    errors: Callable[[Sequence[FeatureSet]], Float64[np.ndarray, " sets"]],
    candidates: Sequence[str],
    start: FeatureSet = SCALING,
    tolerance: float = 1e-4,
) -> Selection:
    """Add the candidate with the lowest error (the first of equal ones), again and again, while it falls by more than `tolerance`.

    >>> value = {"a": 0.5, "b": 0.2, "c": 0.0}
    >>> forward(lambda sets: np.array([1 - sum(map(value.get, one)) for one in sets]), ["a", "b", "c"], start=()).features
    ('a', 'b')
    """
    features, steps = tuple(start), []
    error = float(errors([features])[0]) if features else float("inf")
    while left := [name for name in candidates if name not in features]:
        found = errors([(*features, name) for name in left])
        best = int(found.argmin())
        if not error - found[best] > tolerance:
            break
        features = (*features, left[best])
        steps.append(Step(left[best], error, float(found[best])))
        error = float(found[best])
    return Selection(features, tuple(steps))


def select(
    table: Table,
    y: Float64[np.ndarray, " models"],
    search: Search,
    start: FeatureSet = SCALING,
    candidates: Sequence[str] = (),
    judged: Callable[[int], object] = lambda sets: None,
) -> Selection:
    """Forward selection on all rows of the table, among `candidates` (default: all its features). With `PUBLISHED`, the paper's.

    The error of the last step is optimistic: it was the lowest of many. For an honest one see `select_nested`. `judged` is called with how
    many sets of features were judged since the last call.
    """
    bins = binned(table.values)

    def errors(sets: Sequence[FeatureSet]) -> Float64[np.ndarray, " sets"]:
        return nested_errors(table, y, sets, search, bins, judged).mean((1, 2))

    return forward(errors, candidates or table.features, start, search.tolerance)


def select_nested(
    table: Table,
    y: Float64[np.ndarray, " models"],
    splits: Sequence[Split],
    search: Search,
    start: FeatureSet = SCALING,
    candidates: Sequence[str] = (),
    after_each: Callable[[], object] = lambda: None,
) -> NestedSelection:
    """Select inside the training set of each split; fit `Boosted` there to the choice, and to `start` alone; predict the test models.

    No score of a test model has any part in what is predicted for it. `after_each` is called after each split.
    """
    selections, predictions = [], np.full((1 + max(one.repeat for one in splits), len(table)), np.nan)
    for one in splits:
        train, known = table.rows(one.train), y[one.train]
        selections.append(select(train, known, search, start, candidates))
        chosen = selections[-1].features
        fitted = Boosted().fit(train.select(chosen), known)
        predictions[one.repeat, one.test] = fitted.predict(table.rows(one.test).select(chosen))
        after_each()
    baseline = cross_validate(table.select(start), y, Boosted(), splits)
    return NestedSelection(tuple(selections), CrossValidation(y, table.families, tuple(splits), predictions), baseline)


def frequencies(selections: Sequence[Selection], candidates: Sequence[str]) -> dict[str, float]:
    """How often each feature was chosen, the most frequent first."""
    share = {name: sum(name in one.features for one in selections) / len(selections) for name in candidates}
    return dict(sorted(share.items(), key=lambda item: -item[1]))


def stability(
    table: Table,
    y: Float64[np.ndarray, " models"],
    search: Search,
    resamples: int = 20,
    start: FeatureSet = SCALING,
    candidates: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """How often each feature is chosen from half of the models: stability selection.

    Families are shuffled and taken whole until half of the models are in, so that no choice rests on one family. What is chosen from few
    of the halves is no finding. Source: Meinshausen and Bühlmann 2010; families as the units.
    """
    generator, family, selections = np.random.default_rng(seed), family_numbers(table.families), []
    sizes = np.bincount(family)
    for _ in range(resamples):
        order = generator.permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        half = np.flatnonzero(np.isin(family, order[before < len(table) / 2]))
        selections.append(select(table.rows(half), y[half], search, start, candidates))
    return frequencies(selections, [name for name in candidates or table.features if name not in start])


def nested_errors(
    table: Table,
    y: Float64[np.ndarray, " models"],
    sets: Sequence[FeatureSet],
    search: Search,
    bins: Bins | None = None,
    judged: Callable[[int], object] = lambda sets: None,
) -> Float64[np.ndarray, "sets seeds folds"]:
    """The mean absolute error of each set of features on each test fold of each seed, its setting chosen in the training fold.

    All forests of a block of sets are fitted together by `held_out_errors`, those of fewer trees as prefixes of those of more. With
    `PUBLISHED` these are the errors of scikit-learn's GridSearchCV of xgboost, as the paper's code runs it.
    `bins`: of the table's values, if they are known already; `judged`: as in `select`.
    Raises: `UserError` if there are fewer models than folds.
    """
    for one in sets:
        table.select(one)
    bins = bins or binned(table.values)
    divisions = [division for seed in range(search.seeds) for division in _divisions(table, search, seed)]
    inner = len(divisions[0].inner) * len({(depth, rate) for depth, rate, _ in search.grid})
    block = max(1, _FITS // (len(divisions) * max(inner, 1)))
    columns = np.array([[name in one for name in table.features] for one in sets])
    found = []
    for some in np.split(columns, range(block, len(sets), block)):
        found.append(_errors(bins, y, some, divisions, search.grid))
        judged(len(some))
    return np.concatenate(found).reshape(len(sets), search.seeds, search.folds)


@dataclass(frozen=True, eq=False)
class _Division:
    train: Rows
    test: Rows
    inner: tuple[tuple[Rows, Rows], ...]


def _divisions(table: Table, search: Search, seed: int) -> list[_Division]:
    """The outer folds of a seed; the same seed draws what is set aside and the inner folds, as in the paper's code."""
    found = []
    for train, test in _folds(np.arange(len(table)), table.families, search, seed, search.set_aside):
        inner = _folds(train, table.families, search, seed) if len(search.grid) > 1 else []
        found.append(_Division(train, test, tuple(inner)))
    return found


def _folds(rows: Rows, families: Sequence[str], search: Search, seed: int, set_aside: float = 0.0) -> list[tuple[Rows, Rows]]:
    from sklearn.model_selection import GroupKFold

    if search.by_family:
        of = [families[row] for row in rows]
        if len({*of}) < search.folds:
            raise UserError(
                f"{len(rows)} models of {len({*of})} families cannot be divided into {search.folds} folds of families"
            )
        folds = GroupKFold(search.folds, shuffle=True, random_state=seed).split(rows, groups=of)
        return [(rows[train], rows[test]) for train, test in folds]
    found = random_folds(len(rows), search.folds, (seed,), set_aside)
    return [(rows[one.train], rows[one.test]) for one in found]


def _errors(
    bins: Bins, y: np.ndarray, columns: np.ndarray, divisions: Sequence[_Division], grid: Sequence[tuple[int, float, int]]
) -> Float64[np.ndarray, "sets divisions"]:
    """Of each set of columns on the test rows of each division, with the setting that was best inside (the first of equal ones)."""
    forests = [*dict.fromkeys((depth, rate) for depth, rate, _ in grid)]
    prefixes = sorted({trees for *_, trees in grid})
    forest = np.array([forests.index((depth, rate)) for depth, rate, _ in grid])
    prefix = np.array([prefixes.index(trees) for *_, trees in grid])
    sets, number = np.indices((len(columns), len(divisions)))
    best = np.zeros(sets.shape, np.int64)
    if len(grid) > 1:
        pairs = [pair for division in divisions for pair in division.inner]
        index = np.indices((len(columns), len(pairs), len(forests))).reshape(3, -1)
        found = _held_out(bins, y, columns[index[0]], pairs, index[1], np.array(forests)[index[2]], prefixes)
        found = found.reshape(len(columns), len(divisions), -1, len(forests), len(prefixes)).mean(2)
        best = found[:, :, forest, prefix].argmin(2)
    outer = [(division.train, division.test) for division in divisions]
    settings = np.array(forests)[forest[best].ravel()]
    found = _held_out(bins, y, columns[sets.ravel()], outer, number.ravel(), settings, prefixes)
    return np.take_along_axis(found, prefix[best].reshape(-1, 1), axis=1).reshape(best.shape)


def _held_out(
    bins: Bins,
    y: np.ndarray,
    columns: np.ndarray,
    pairs: Sequence[tuple[Rows, Rows]],
    of_pair: np.ndarray,
    settings: np.ndarray,
    prefixes: Sequence[int],
) -> Float64[np.ndarray, "models prefixes"]:
    """Errors of forests, each with its columns, its pair of training and test rows, its depth and learning rate."""
    masks = np.zeros((2, len(pairs), len(y)), np.bool_)
    for number, rows in enumerate(pairs):
        for mask, some in zip(masks, rows, strict=True):
            mask[number, some] = True
    depth, rate = settings[:, 0].astype(np.int64), settings[:, 1]
    rows, tested = masks[0][of_pair], masks[1][of_pair]
    found = held_out_errors(bins, y[None], rows, tested, columns, depth=depth, learning_rate=rate, prefixes=prefixes)
    return np.asarray(found)
