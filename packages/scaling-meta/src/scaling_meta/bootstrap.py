"""The family bootstrap: statistics of refits to families drawn with replacement, whole, because siblings tell the same story."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, UInt8

from lmcore.errors import UserError
from scaling_meta.inference import Estimate

Draws = UInt8[np.ndarray, "draws models"]


def family_draws(families: Sequence[str], draws: int, seed: int = 0) -> Draws:
    """How often each model is in the data (row 0: once), and in each of `draws` draws of as many families as there are.

    A draw with fewer than two families is drawn again: nothing could be held out of it.

    >>> family_draws(["Llama", "Pythia", "Llama"], 2)
    array([[1, 1, 1],
           [1, 1, 1],
           [1, 1, 1]], dtype=uint8)

    Raises: `UserError` if all models are of one family.
    """
    names, of_row = np.unique(np.array(families, dtype=np.str_), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{len(families)} models are of {len(names)} family: a bootstrap of families needs two")
    generator, counts = np.random.default_rng(seed), [np.ones(len(names), np.int64)]
    while len(counts) <= draws:
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
        if (drawn > 0).sum() >= 2:
            counts.append(drawn)
    return np.stack(counts)[:, of_row].astype(np.uint8)


def estimate(values: Float64[np.ndarray, " draws"], level: float = 0.95) -> Estimate:
    """The statistic of the data, `values[0]`, with the percentiles of those of the draws; NaN, NaN if there was no draw."""
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2]) if len(values) > 1 else (np.nan, np.nan)
    return Estimate(float(values[0]), (float(low), float(high), level))
