"""Boosted trees in plain numpy, one model, one tree and one node at a time: the oracle of the kernels."""
# mypy: allow-untyped-defs

import numpy as np

from scaling_meta.ops.bins import MISSING

SMALLEST_GAIN = np.float32(1e-6)  # a split must gain more; xgboost's kRtEps


def boost(bins, y, rows, columns, target, depth, learning_rate, trees, l2, min_child_weight):
    """See `scaling_meta.ops.forests.boost`."""
    models, nodes = len(rows), 2 ** (int(depth.max()) + 1) - 1
    base = np.zeros(models, np.float32)
    feature = np.full((models, trees, nodes), -1, np.int16)
    threshold, missing_left = np.zeros(feature.shape, np.uint8), np.zeros(feature.shape, bool)
    value, cover = np.zeros(feature.shape, np.float32), np.zeros(feature.shape, np.float32)
    for m in range(models):
        trained = np.flatnonzero(rows[m])
        codes, label, weight = (
            bins.codes[trained],
            y[target[m], trained].astype(np.float32),
            rows[m, trained].astype(np.float64),
        )
        cuts = {int(f): cut_codes(codes[:, f], bins.ceilings[f]) for f in np.flatnonzero(columns[m])}
        base[m] = np.sum(label * weight) / np.sum(weight)
        prediction = np.full(len(trained), base[m], np.float32)
        for t in range(trees):
            gradient = ((prediction - label) * weight.astype(np.float32)).astype(np.float64)
            members = {0: np.arange(len(trained))}
            for node in range(2 ** (depth[m] + 1) - 1):
                if node not in members:
                    continue
                here = members[node]
                sums = gradient[here].sum(), weight[here].sum()
                split = None
                if node < 2 ** depth[m] - 1:
                    split = best_split(codes[here], gradient[here], weight[here], cuts, l2, min_child_weight)
                cover[m, t, node] = sums[1]
                if split is None:
                    value[m, t, node] = np.float32(-sums[0] / (sums[1] + l2)) * np.float32(learning_rate[m])
                    prediction[here] += value[m, t, node]
                    continue
                feature[m, t, node], threshold[m, t, node], missing_left[m, t, node] = split
                left = goes_left(codes[here, split[0]], split[1], split[2])
                members[2 * node + 1], members[2 * node + 2] = here[left], here[~left]
    return base, feature, threshold, missing_left, value, cover


def predict(codes, base, feature, threshold, missing_left, value):
    """See `scaling_meta.ops.forests.Forests.predict`."""
    prediction = np.empty((len(base), len(codes)), np.float32)
    for m in range(len(base)):
        prediction[m] = base[m]
        for t in range(feature.shape[1]):
            for row, code in enumerate(codes):
                node = 0
                while feature[m, t, node] >= 0:
                    left = goes_left(code[feature[m, t, node]], threshold[m, t, node], missing_left[m, t, node])
                    node = 2 * node + (1 if left else 2)
                prediction[m, row] += value[m, t, node]
    return prediction


def errors(bins, y, rows, held_out, columns, target, depth, learning_rate, prefixes, l2, min_child_weight):
    """See `scaling_meta.ops.forests.held_out_errors`."""
    base, *trees, _ = boost(bins, y, rows, columns, target, depth, learning_rate, max(prefixes), l2, min_child_weight)
    result = np.empty((len(rows), len(prefixes)))
    for i, prefix in enumerate(prefixes):
        prediction = predict(bins.codes, base, *(array[:, :prefix] for array in trees))
        result[:, i] = [np.abs(prediction[m] - y[target[m]])[held_out[m]].mean() for m in range(len(rows))]
    return result


def goes_left(code, threshold, missing_left):
    """Whether rows with such codes in the feature of a node go to its left child."""
    return np.where(code == MISSING, missing_left, code < threshold)


def cut_codes(codes, ceilings):
    """Where a feature may be cut: at each code of a training row but the smallest, and above the largest."""
    known = np.unique(codes[codes != MISSING])
    return np.append(known[1:], ceilings[known[-1]]) if len(known) else known


def best_split(codes, gradient, weight, cuts, l2, min_child_weight):
    """Return the feature, the threshold and whether missing values go left of the split that gains most, or None if none gains.

    xgboost visits features in order; in each, cuts upwards with missing values on the right, then downwards with them on the left. A split
    must gain more than all before it. The sums of float32 gradients are doubles: exact, hence the same in any order; gains are float32.
    """
    total, count = gradient.sum(), weight.sum()
    best, most = None, SMALLEST_GAIN
    for feature, cut in cuts.items():
        code = codes[:, feature]
        missing = code == MISSING
        for missing_left in (False, True) if missing.any() else (False,):
            candidates = cut[:-1][::-1] if missing_left else cut
            left = goes_left(code[:, None], candidates, missing_left)
            left_sum, left_count = gradient @ left, weight @ left
            gains = score(left_sum, left_count, l2) + score(total - left_sum, count - left_count, l2) - score(total, count, l2)
            gains[(left_count < min_child_weight) | (count - left_count < min_child_weight)] = 0
            if len(gains) and gains.max() > most:
                first = int(gains.argmax())
                best, most = (feature, candidates[first], missing_left), gains[first]
    return best


def score(gradient, count, l2):
    """The loss that a leaf with these sums saves, twice: G² / (H + l2) in float32 as in xgboost."""
    return np.square(gradient).astype(np.float32) / np.asarray(count + l2).astype(np.float32)
