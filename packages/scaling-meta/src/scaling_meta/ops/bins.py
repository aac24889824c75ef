"""Features as small integers: each value by its rank among the distinct values of the whole table."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8

MISSING = 255


@dataclass(frozen=True)
class Bins:
    """The features of a table as ranks, and what turns new rows into ranks and ranks into values.

    `x < values[f, k]` holds exactly where `code < k`, so a tree grown on codes, which splits at `code < k`, splits at that value. A model
    may be fitted to any of the rows: the table is binned once for all folds, because a split lies between values of training rows only.

    codes: the rank of each value in its feature, 0 the smallest; `MISSING` where it is missing
    values: the distinct values in increasing order, infinity after the last
    ceilings: for rank k, how many values lie below `v + |v| + 1e-5` with v = values[f, k]. That is where xgboost ends the last bin of a
      feature whose largest training value is v; beyond it, a row goes where a tree sends rows whose value is missing.
    """

    codes: UInt8[np.ndarray, "rows features"]
    values: Float32[np.ndarray, "features ranks"]
    ceilings: UInt8[np.ndarray, "features ranks"]

    def encode(self, values: Float[np.ndarray, "new features"]) -> UInt8[np.ndarray, "new features"]:
        """Return the codes of new rows: of each value the rank of the largest known value that is not above it, 0 below the smallest.

        >>> binned(np.array([[2.0], [7.0], [5.0]])).encode(np.array([[1.0], [5.5], [np.nan], [100.0]])).ravel()
        array([  0,   1, 255,   2], dtype=uint8)
        """
        codes = np.full(values.shape, MISSING, np.uint8)
        for feature, (column, known) in enumerate(zip(values.astype(np.float32).T, self.values, strict=True)):
            there = ~np.isnan(column)
            codes[there, feature] = np.maximum(np.searchsorted(known, column[there], side="right") - 1, 0)
        return codes


def binned(values: Float[np.ndarray, "rows features"]) -> Bins:
    """Rank each feature, as float32 because xgboost compares float32. NaN is missing.

    A feature of more than 255 distinct values is cut at 255 of their quantiles (values between two cuts share the lower one's rank).

    >>> binned(np.array([[2.0, np.nan], [7.0, 1.0], [2.0, 0.0]])).codes
    array([[  0, 255],
           [  1,   1],
           [  0,   0]], dtype=uint8)

    Raises: `ValueError` if a value is infinite as float32.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if np.isinf(single).any():
        row, feature = np.argwhere(np.isinf(single))[0]
        raise ValueError(f"row {row}, feature {feature} holds {values[row, feature]}: expected finite float32 numbers, or NaN")
    table = np.full((values.shape[1], MISSING), np.inf, np.float32)
    ceilings = np.zeros(table.shape, np.uint8)
    for feature, column in enumerate(single.T):
        known = np.unique(column[~np.isnan(column)])
        if len(known) > MISSING:
            known = known[np.linspace(0, len(known) - 1, MISSING).round().astype(int)]
        table[feature, : len(known)] = known
        exact = known.astype(np.float64)
        above = (exact + (np.abs(exact) + np.float64(np.float32(1e-5)))).astype(np.float32)
        ceilings[feature, : len(known)] = np.searchsorted(known, above, side="left")
    bins = Bins(np.empty(values.shape, np.uint8), table, ceilings)
    return Bins(bins.encode(values), table, ceilings)
