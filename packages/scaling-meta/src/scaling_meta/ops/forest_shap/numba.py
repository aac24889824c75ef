"""TreeSHAP leaf by leaf: the path to a leaf is found once, then every row runs through its k features."""

import numpy as np
from numba import njit, prange

from scaling_meta.ops.bins import MISSING

_DEEPEST = 12  # as `boost` allows


def forest_shap(codes, base, feature, threshold, missing_left, value, cover):
    """See `scaling_meta.ops.forest_shap`."""
    result = np.zeros((len(base), len(codes), codes.shape[1] + 1))
    weights = np.zeros((_DEEPEST + 1, _DEEPEST + 1))  # of a set of s in k features: s! (k - s - 1)! / k!
    for k in range(1, _DEEPEST + 1):
        weights[k, 0] = 1 / k
        for s in range(1, k):
            weights[k, s] = weights[k, s - 1] * s / (k - s)
    _forest_shap(np.ascontiguousarray(codes), base, feature, threshold, missing_left, value, cover, weights, result)
    return result.astype(np.float32)


@njit(cache=True, nogil=True, parallel=True)
def _forest_shap(codes, base, feature, threshold, missing_left, value, cover, weights, result):
    for m in prange(len(base)):
        result[m, :, -1] = base[m]
        for t in range(feature.shape[1]):
            tree = feature[m, t]
            for leaf in range(len(tree)):
                if tree[leaf] < 0 and (leaf == 0 or tree[(leaf - 1) // 2] >= 0):
                    _add_leaf(
                        codes,
                        tree,
                        threshold[m, t],
                        missing_left[m, t],
                        cover[m, t],
                        leaf,
                        value[m, t, leaf],
                        weights,
                        result[m],
                    )


@njit(cache=True, nogil=True)
def _add_leaf(codes, feature, threshold, missing_left, cover, leaf, value, weights, result):
    names, share = np.empty(_DEEPEST, np.int64), np.ones(_DEEPEST)
    parents, lefts, place = np.empty(_DEEPEST, np.int64), np.empty(_DEEPEST, np.bool_), np.empty(_DEEPEST, np.int64)
    length = k = 0
    node = leaf
    while node > 0:
        parent = (node - 1) // 2
        j = 0
        while j < k and names[j] != feature[parent]:
            j += 1
        if j == k:
            names[k] = feature[parent]
            k += 1
        share[j] *= cover[node] / cover[parent]
        parents[length], lefts[length], place[length] = parent, node == 2 * parent + 1, j
        length += 1
        node = parent
    expectation = value * np.prod(share[:k])
    follows, polynomial = np.empty(_DEEPEST), np.empty(_DEEPEST)
    for row in range(len(codes)):
        result[row, -1] += expectation
        follows[:k] = 1.0
        for i in range(length):
            code = codes[row, feature[parents[i]]]
            left = missing_left[parents[i]] if code == MISSING else code < threshold[parents[i]]
            if left != lefts[i]:
                follows[place[i]] = 0.0
        for j in range(k):
            polynomial[0] = 1.0  # the product of share + follows x over the other features
            degree = 0
            for q in range(k):
                if q != j:
                    polynomial[degree + 1] = polynomial[degree] * follows[q]
                    for s in range(degree, 0, -1):
                        polynomial[s] = polynomial[s] * share[q] + polynomial[s - 1] * follows[q]
                    polynomial[0] *= share[q]
                    degree += 1
            total = 0.0
            for s in range(k):
                total += weights[k, s] * polynomial[s]
            result[row, names[j]] += value * (follows[j] - share[j]) * total
