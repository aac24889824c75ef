"""Matched pairs: two models of one family that differ in one thing, as close to an experiment as a table of models comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64

from scaling_meta.database import Scores
from scaling_meta.schema import DATA, SCALING
from scaling_meta.table import Table

TREATMENTS: Mapping[str, str] = {"-deduped": "training data deduplicated"}
"""Treatments that no feature tells: what is appended to the name of the untreated model."""


@dataclass(frozen=True)
class Pair:
    """Two siblings and the difference in score, second minus first.

    change: what differs, in words that all pairs with the same change share: categories go in the order of their names, numbers and shares
      upwards (a mix of data is told by its code, or else by the share that changes most)
    detail: the values before and after
    step: by how much; 1 for categories and treatments
    log_ratios: of the second to the first, natural logarithm of the ratio of sizes and of tokens
    adjusted: the difference without what the log ratios explain (see `matched_pairs`)
    stderr: standard error of the difference from the evaluations' alone, NaN if unknown
    unknown: features that are known of only one of the two, and so might differ too
    """

    family: str
    first: str
    second: str
    change: str
    detail: str
    step: float
    log_ratios: tuple[float, float]
    difference: float
    adjusted: float
    stderr: float
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class SignTest:
    """Of pairs with one change and no model in common, how many score higher after it, and how often a fair coin is as uneven.

    pairs: how many, of `all_pairs` with this change
    higher: by the adjusted difference, whose median is `median`
    p: two-sided, ties left out
    """

    change: str
    all_pairs: int
    pairs: int
    higher: int
    families: tuple[str, ...]
    median: float
    p: float


def matched_pairs(table: Table, scores: Scores, *, most: float = 0.5) -> list[Pair]:
    """All pairs within families that differ in exactly one feature other than scale, or in one of `TREATMENTS` and no feature.

    The shares of the data are one feature, their mix: one share cannot change alone. Sizes and tokens may differ by up to `most` in natural
    logarithm (0.5 is a factor of 1.65); for that the difference is adjusted by the slopes of log size and log tokens within families
    (ordinary least squares on all models, each family with its own mean). Models without a score, size or tokens are left out.
    """
    table, y, stderr = _usable(table, scores)
    slopes = _slopes_within_families(table, y)
    logs = table.select(SCALING).values
    pairs = []
    for first, second in combinations(range(len(table)), 2):
        if table.families[first] != table.families[second] or (np.abs(logs[second] - logs[first]) > most).any():
            continue
        change = _change(table, first, second)
        if change is None:
            continue
        name, detail, step, swapped = change
        if swapped:
            first, second = second, first
        ratios = logs[second] - logs[first]
        difference = float(y[second] - y[first])
        pairs.append(
            Pair(
                table.families[first], table.models[first], table.models[second], name, detail, step, (float(ratios[0]), float(ratios[1])),
                difference, difference - float(ratios @ slopes), float(np.hypot(stderr[first], stderr[second])),
                _known_of_one(table, first, second),
            )
        )  # fmt: skip
    return sorted(pairs, key=lambda pair: (pair.change, pair.first, pair.second))


def sign_tests(pairs: Sequence[Pair]) -> list[SignTest]:
    """A sign test of the adjusted differences for each change. It speaks of the families that have such pairs, which are named.

    A model counts in one pair only: those with the largest step are taken first, of equal ones those closest in scale.
    """
    from scipy.stats import binomtest

    found = []
    for change in sorted({pair.change for pair in pairs}):
        every = [pair for pair in pairs if pair.change == change]
        some = _disjoint(every)
        signs = np.sign([pair.adjusted for pair in some])
        higher, decided = int((signs > 0).sum()), int((signs != 0).sum())
        p = float(binomtest(higher, decided).pvalue) if decided else 1.0
        families = tuple(sorted({pair.family for pair in some}))
        found.append(
            SignTest(change, len(every), len(some), higher, families, float(np.median([pair.adjusted for pair in some])), p)
        )
    return found


def _disjoint(pairs: Sequence[Pair]) -> list[Pair]:
    taken, used = [], set[str]()
    for pair in sorted(pairs, key=lambda pair: (-pair.step, abs(pair.log_ratios[0]) + abs(pair.log_ratios[1]), pair.first)):
        if not used & {pair.first, pair.second}:
            taken.append(pair)
            used |= {pair.first, pair.second}
    return taken


def _change(table: Table, first: int, second: int) -> tuple[str, str, float, bool] | None:
    """What differs between two models, the values, by how much, and whether the second comes first; None if it is not one thing."""
    a, b = table.values[first], table.values[second]
    differ = [
        name for place, name in enumerate(table.features)
        if name not in SCALING and not np.isnan(a[place] + b[place]) and a[place] != b[place]
    ]  # fmt: skip
    treatment = _treatment(table.models[first], table.models[second])
    if treatment is not None:
        return None if differ else treatment
    architecture, shares = [name for name in differ if name not in DATA], [name for name in differ if name in DATA]
    if len(architecture) + bool(shares) != 1:
        return None
    if shares:
        by_change = sorted(shares, key=lambda share: -abs(table.column(share)[second] - table.column(share)[first]))
        name = "share_code" if "share_code" in shares else by_change[0]
        swapped = bool(table.column(name)[first] > table.column(name)[second])
        before, after = (second, first) if swapped else (first, second)
        detail = ", ".join(f"{share} {table.column(share)[before]:g} -> {table.column(share)[after]:g}" for share in shares)
        return f"{name} up", detail, float(abs(table.column(name)[after] - table.column(name)[before])), swapped
    (name,) = architecture
    column = table.column(name)
    swapped = bool(column[first] > column[second])
    before, after = (second, first) if swapped else (first, second)
    if name in table.categories:
        names = [table.categories[name][int(column[row])] for row in (before, after)]
        return f"{name} {names[0]} -> {names[1]}", f"{names[0]} -> {names[1]}", 1.0, swapped
    return f"{name} up", f"{column[before]:g} -> {column[after]:g}", float(column[after] - column[before]), swapped


def _treatment(first: str, second: str) -> tuple[str, str, float, bool] | None:
    for suffix, what in TREATMENTS.items():
        if second == first + suffix or first == second + suffix:
            return what, "", 1.0, first == second + suffix
    return None


def _known_of_one(table: Table, first: int, second: int) -> tuple[str, ...]:
    one = np.isnan(table.values[first]) != np.isnan(table.values[second])
    return tuple(name for name, missing in zip(table.features, one, strict=True) if missing)


def _slopes_within_families(table: Table, y: Float64[np.ndarray, " models"]) -> Float64[np.ndarray, " 2"]:
    of_row = np.unique(np.array(table.families, dtype=np.str_), return_inverse=True)[1]
    values = np.column_stack([table.select(SCALING).values, y])
    means = np.stack([np.bincount(of_row, column) / np.bincount(of_row) for column in values.T], axis=1)
    inner = values - means[of_row]
    return np.linalg.lstsq(inner[:, :2], inner[:, 2], rcond=None)[0]


def _usable(table: Table, scores: Scores) -> tuple[Table, Float64[np.ndarray, " models"], Float64[np.ndarray, " models"]]:
    known = ~np.isnan(np.column_stack([table.select(SCALING).values, scores.values])).any(1)
    return table.rows(known), scores.values[known], scores.stderr[known]
