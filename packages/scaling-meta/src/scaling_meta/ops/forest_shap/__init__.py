"""Exact TreeSHAP of many tiny forests."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8

from lmcore.dispatch import pick

if TYPE_CHECKING:
    from scaling_meta.ops.forests import Forests


def forest_shap(
    forests: "Forests", codes: UInt8[np.ndarray, "rows features"]
) -> Float32[np.ndarray, "models rows features_and_expectation"]:
    """Return what each feature adds to each prediction, and in the last column the expectation that they add to: they sum to `predict`.

    The Shapley value of feature j in a tree, with the expectation over features that are not known taken along its paths, weighted by the
    training rows that went each way (path-dependent, xgboost's `pred_contribs`):

        Σ over leaves v (o_j - z_j) Σ_S |S|! (k - |S| - 1)! / k!  Π_{q in S} o_q  Π_{q not in S} z_q

    over subsets S of the k - 1 other features on the path to the leaf of value v; z_q is the share of rows that go on along the path at the
    nodes of feature q, and o_q is 1 if this row does at all of them, else 0. The inner sum is read off the coefficients of
    Π_q (z_q + o_q x). Sums are float64. About k³ operations per row and leaf, k at most the depth.

    >>> from scaling_meta.ops.bins import binned
    >>> from scaling_meta.ops.forests import boost
    >>> bins = binned(np.array([[1.0], [2.0], [3.0], [4.0]]))
    >>> rows, columns = np.ones((1, 4), bool), np.ones((1, 1), bool)
    >>> forests = boost(bins, np.array([[0.0, 0.0, 1.0, 1.0]]), rows, columns, depth=1, learning_rate=1.0, trees=20)
    >>> forest_shap(forests, bins.codes)[0].round(3).tolist()
    [[-0.5, 0.5], [-0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]

    Source: Lundberg et al. 2020, "From local explanations to global understanding with explainable AI for trees", algorithm 1 and 2.
    """
    arrays = (forests.base, forests.feature, forests.threshold, forests.missing_left, forests.value, forests.cover)
    result: Float32[np.ndarray, "models rows features_and_expectation"] = pick(__name__, codes).forest_shap(codes, *arrays)
    return result
