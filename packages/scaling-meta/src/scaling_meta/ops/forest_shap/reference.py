"""TreeSHAP by its definition: a tree's expectation for every set of known features, and Shapley's weights."""
# mypy: allow-untyped-defs

from itertools import combinations
from math import factorial

import numpy as np

from scaling_meta.ops.forests.reference import goes_left


def forest_shap(codes, base, feature, threshold, missing_left, value, cover):
    """See `scaling_meta.ops.forest_shap`."""
    result = np.zeros((len(base), *codes.shape), np.float64)
    expectation = base[:, None] + np.zeros(len(codes))
    for m in range(len(base)):
        for t in range(feature.shape[1]):
            tree = feature[m, t], threshold[m, t], missing_left[m, t], value[m, t], cover[m, t]
            used = sorted({int(f) for f in feature[m, t] if f >= 0})
            for row, code in enumerate(codes):
                expectation[m, row] += expected(tree, code, frozenset())
                for f in used:
                    result[m, row, f] += shapley_value(tree, code, f, [other for other in used if other != f])
    return np.concatenate([result, expectation[..., None]], -1).astype(np.float32)


def shapley_value(tree, code, feature, others):
    """The gain of knowing `feature`, averaged over the orders in which the features become known."""
    total, k = 0.0, len(others) + 1
    for size in range(k):
        weight = factorial(size) * factorial(k - size - 1) / factorial(k)
        for known in combinations(others, size):
            total += weight * (expected(tree, code, {*known, feature}) - expected(tree, code, {*known}))
    return total


def expected(tree, code, known, node=0):
    """The tree's value for a row where features are known; where not, both children count by their training rows."""
    feature, threshold, missing_left, value, cover = tree
    if feature[node] < 0:
        return float(value[node])
    left, right = 2 * node + 1, 2 * node + 2
    if feature[node] in known:
        side = goes_left(code[feature[node]], threshold[node], missing_left[node])
        return expected(tree, code, known, left if side else right)
    return sum(float(cover[child] / cover[node]) * expected(tree, code, known, child) for child in (left, right))
