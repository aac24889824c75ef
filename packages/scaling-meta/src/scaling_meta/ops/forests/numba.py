"""Boosted trees at a CPU's pace: rows are few, so each feature keeps them in sorted order and a split is found in one walk along it.

The order is made once per model. A node is a slice of it, the rows with the feature missing at the end, and splitting a node sorts each
feature's slice stably into its children's. All of a model's state fits into the first-level cache.
"""

import numpy as np
from numba import njit, prange

MISSING = 255
SMALLEST_GAIN = np.float32(1e-6)


def boost(bins, y, rows, columns, target, depth, learning_rate, trees, l2, min_child_weight):
    """See `scaling_meta.ops.forests.boost`."""
    shape = (len(rows), trees, 2 ** (int(depth.max()) + 1) - 1)
    grown = (
        np.full(shape, -1, np.int16),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.bool_),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
    )
    base = np.zeros(len(rows), np.float32)
    _boost(*_table(bins), y, rows, columns, target, depth, learning_rate, l2, min_child_weight, base, grown)
    return base, *grown


def errors(bins, y, rows, held_out, columns, target, depth, learning_rate, prefixes, l2, min_child_weight):
    """See `scaling_meta.ops.forests.held_out_errors`."""
    result = np.zeros((len(rows), len(prefixes)))
    prefixes = np.asarray(prefixes, np.int64)
    _errors(*_table(bins), y, rows, held_out, columns, target, depth, learning_rate, prefixes, l2, min_child_weight, result)
    return result


def predict(codes, base, feature, threshold, missing_left, value):
    """See `scaling_meta.ops.forests.Forests.predict`."""
    prediction = np.empty((len(base), len(codes)), np.float32)
    _predict(np.ascontiguousarray(codes.T), base, feature, threshold, missing_left, value, prediction)
    return prediction


def _table(bins):
    """Return the codes by feature, the rows of each feature in sorted order (missing last), and the ceilings."""
    codes = np.ascontiguousarray(bins.codes.T)
    return codes, np.argsort(codes, axis=1, kind="stable").astype(np.uint16), bins.ceilings


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _boost(codes, order, ceilings, y, rows, columns, target, depth, rate, l2, min_child_weight, base, grown):
    for m in prange(len(rows)):
        label, prediction = y[target[m]], np.empty(y.shape[1], np.float32)
        base[m] = _mean(label, rows[m])
        prediction[:] = base[m]
        used = np.flatnonzero(columns[m])
        model = _model(codes, order, ceilings, rows[m], used, depth[m])
        for t in range(grown[0].shape[1]):
            tree = grown[0][m, t], grown[1][m, t], grown[2][m, t], grown[3][m, t], grown[4][m, t]
            _grow(model, used, label, rows[m], depth[m], rate[m], l2, min_child_weight, prediction, tree)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _errors(codes, order, ceilings, y, rows, held_out, columns, target, depth, rate, prefixes, l2, min_child_weight, result):
    for m in prange(len(rows)):
        label, prediction = y[target[m]], np.empty(y.shape[1], np.float32)
        prediction[:] = _mean(label, rows[m])
        used, tested = np.flatnonzero(columns[m]), np.flatnonzero(held_out[m])
        model = _model(codes, order, ceilings, rows[m], used, depth[m])
        nodes = 2 ** (depth[m] + 1) - 1
        feature, threshold, missing_left = np.empty(nodes, np.int16), np.empty(nodes, np.uint8), np.empty(nodes, np.bool_)
        value, cover = np.empty(nodes, np.float32), np.empty(nodes, np.float32)
        outside = tested[rows[m][tested] == 0]  # those of the training rows that are tested too are predicted as the tree grows
        for t in range(prefixes.max()):
            feature[:] = -1
            _grow(
                model,
                used,
                label,
                rows[m],
                depth[m],
                rate[m],
                l2,
                min_child_weight,
                prediction,
                (feature, threshold, missing_left, value, cover),
            )
            for row in outside:
                prediction[row] += value[_leaf(codes, row, feature, threshold, missing_left)]
            for i in range(len(prefixes)):
                if prefixes[i] == t + 1:
                    total = 0.0
                    for row in tested:
                        total += abs(prediction[row] - label[row])
                    result[m, i] = total / len(tested)


@njit(parallel=True, cache=True, nogil=True)
def _predict(codes, base, feature, threshold, missing_left, value, prediction):
    for m in prange(len(base)):
        prediction[m] = base[m]
        for t in range(feature.shape[1]):
            for row in range(codes.shape[1]):
                prediction[m, row] += value[m, t, _leaf(codes, row, feature[m, t], threshold[m, t], missing_left[m, t])]


@njit(cache=True, nogil=True)
def _leaf(codes, row, feature, threshold, missing_left):
    node = 0
    while feature[node] >= 0:
        code = codes[feature[node], row]
        left = missing_left[node] if code == MISSING else code < threshold[node]
        node = 2 * node + 2 - left
    return node


@njit(cache=True, nogil=True, error_model="numpy")
def _mean(label, weight):
    total, count = 0.0, 0
    for row in range(len(label)):
        if weight[row]:
            total += np.float32(label[row]) * np.float32(weight[row])
            count += weight[row]
    return np.float32(total / count)


@njit(cache=True, nogil=True, error_model="numpy")
def _model(codes, order, ceilings, weight, used, depth):
    """Return what all trees of a model share, and room for one tree to grow in.

    first [features, trained]: the training rows of each feature in sorted order, as items `code << 16 | row`; cuts [features, codes]: for
    the code of a training row, the threshold above it.
    """
    trained = np.count_nonzero(weight)
    first, cuts = np.empty((len(used), trained), np.uint32), np.empty((len(used), MISSING), np.uint8)
    for j in range(len(used)):
        code_of, size, last = codes[used[j]], 0, MISSING
        for row in order[used[j]]:
            if weight[row]:
                code = np.int64(code_of[row])
                first[j, size] = code << 16 | np.int64(row)
                size += 1
                if code != MISSING:
                    if last != MISSING:
                        cuts[j, last] = code
                    last = code
        if last != MISSING:
            cuts[j, last] = ceilings[used[j], last]
    sides = np.empty(len(weight)), np.empty(len(weight), np.uint8)
    places = (
        np.empty(trained),
        np.empty(trained),
        np.empty(trained),
        np.empty(trained, np.int32),
        np.empty(trained, np.int32),
        np.empty(trained, np.int32),
        np.empty(trained, np.float32),
        np.empty(trained, np.float32),
    )
    nodes = np.empty((2, 2**depth, 4), np.int64), np.empty((2, 2**depth))
    best = np.empty((2**depth, 4), np.int64), np.empty(2**depth), np.empty(2**depth, np.float32)
    return first, cuts, (np.empty_like(first), np.empty_like(first), sides, places, nodes, best)


@njit(cache=True, nogil=True, error_model="numpy")
def _grow(model, used, label, weight, depth, rate, l2, min_child_weight, prediction, tree):
    """Grow one tree into the arrays of `tree`, nodes in heap order, and add its leaves to the predictions of the training rows."""
    first, cuts, (items, goal, (gradient, on_right), places, (nodes, sums), best) = model
    feature, threshold, missing_left, value, cover = tree
    features, trained = first.shape
    total, count = 0.0, 0
    for item in first[0]:
        row = item & 0xFFFF
        gradient[row] = (prediction[row] - np.float32(label[row])) * np.float32(weight[row])
        total += gradient[row]
        count += weight[row]
    even = count == trained
    # of each node of this level that may be split: place in the tree, first and last item, count; and its sum
    nodes[0, 0, 0], nodes[0, 0, 1], nodes[0, 0, 2], nodes[0, 0, 3], sums[0, 0] = 0, 0, trained, count, total
    source, active, leaves = first, 1, np.zeros(2, np.float32)
    for level in range(depth):
        now, then, wider = nodes[level % 2], nodes[1 - level % 2], 0
        now_sums, then_sums = sums[level % 2], sums[1 - level % 2]
        _best_splits(source, now[:active], now_sums, gradient, weight, even, l2, min_child_weight, places, best)
        for s in range(active):
            node, low, high, count, total = now[s, 0], now[s, 1], now[s, 2], now[s, 3], now_sums[s]
            j, at, flipped, left_count, left_sum = best[0][s, 0], best[0][s, 1], best[0][s, 2], best[0][s, 3], best[1][s]
            cover[node] = count
            if j < 0:
                value[node] = np.float32(-total / (count + l2)) * rate
                for item in source[0, low:high]:
                    prediction[item & 0xFFFF] += value[node]
                continue
            cut = source[j, at + 1] >> 16 if flipped else cuts[j, source[j, at] >> 16]
            feature[node], threshold[node], missing_left[node] = used[j], cut, flipped
            splittable = 0
            for side in range(2):
                child = 2 * node + 1 + side
                child_sum, child_count = (total - left_sum, count - left_count) if side else (left_sum, left_count)
                cover[child], leaves[side] = child_count, 0
                if level + 1 < depth and child_count >= 2 * min_child_weight:
                    then[wider + splittable, 0], then[wider + splittable, 3], then_sums[wider + splittable] = (
                        child,
                        child_count,
                        child_sum,
                    )
                    splittable += 1
                else:
                    value[child] = leaves[side] = np.float32(-child_sum / (child_count + l2)) * rate
            middle = low
            for item in source[j, low:high]:
                row, code = item & 0xFFFF, item >> 16
                right = flipped == 0 if code == MISSING else code >= cut
                prediction[row] += leaves[1] if right else leaves[0]
                on_right[row] = right
                middle += not right
            for _ in range(splittable):
                right = then[wider, 0] % 2 == 0
                then[wider, 1], then[wider, 2] = (middle, high) if right else (low, middle)
                wider += 1
            if splittable:
                for j in range(features):
                    _part(source[j, low:high], goal[j, low:high], middle - low, on_right)
        source, items, goal, active = goal, goal, items, wider
        if active == 0:
            break


@njit(cache=True, nogil=True, error_model="numpy")
def _part(items, goal, lefts, on_right):
    """Sort the items of a node stably into those of its children."""
    left, right = 0, lefts
    for p in range(len(items)):
        item = items[p]
        side = np.int64(on_right[item & 0xFFFF])
        goal[right if side else left] = item
        right += side
        left += 1 - side


@njit(cache=True, nogil=True, error_model="numpy")
def _best_splits(items, nodes, sums, gradient, weight, even, l2, min_child_weight, places, best):
    """Find the best split of each node of a level: feature or -1, last item on the left that is not missing, whether missing ones go left,
    count and sum on the left.
    """
    total, left, flipped_left, count, left_count, flipped_count, whole, gain = places
    chosen, chosen_sum, most = best
    for s in range(len(nodes)):
        chosen[s, 0], most[s] = -1, SMALLEST_GAIN
        low, high = nodes[s, 1], nodes[s, 2]
        total[low:high], count[low:high] = sums[s], nodes[s, 3]
        whole[low:high] = np.float32(sums[s] * sums[s]) / np.float32(nodes[s, 3] + l2)
    first, last = nodes[0, 1], nodes[len(nodes) - 1, 2]
    for j in range(len(items)):
        ordered, missing = items[j], False
        for s in range(len(nodes)):
            missing |= _walk(
                ordered, gradient, weight, even, left, left_count, flipped_left, flipped_count, nodes[s, 1], nodes[s, 2]
            )
        _gains(ordered, total, count, whole, left, left_count, l2, min_child_weight, first, last, gain)
        for s in range(len(nodes)):
            p = _first_above(gain, nodes[s, 1], nodes[s, 2], most[s])
            if p >= 0:
                most[s] = gain[p]
                chosen[s, 0], chosen[s, 1], chosen[s, 2], chosen[s, 3], chosen_sum[s] = j, p, 0, left_count[p], left[p]
        if missing:
            _gains(ordered, total, count, whole, flipped_left, flipped_count, l2, min_child_weight, first, last, gain)
            for s in range(len(nodes)):
                p = _last_above(gain, nodes[s, 1], nodes[s, 2], most[s])
                if p >= 0:
                    most[s] = gain[p]
                    chosen[s, 0], chosen[s, 1], chosen[s, 2], chosen[s, 3], chosen_sum[s] = (
                        j,
                        p,
                        1,
                        flipped_count[p],
                        flipped_left[p],
                    )


@njit(cache=True, nogil=True, error_model="numpy")
def _walk(ordered, gradient, weight, even, left, left_count, flipped_left, flipped_count, low, high):
    present, lost, lost_count = high, 0.0, 0
    while present > low and ordered[present - 1] >> 16 == MISSING:
        present -= 1
        row = ordered[present] & 0xFFFF
        lost += gradient[row]
        lost_count += weight[row]
        left_count[present] = 0
        flipped_count[present] = 0
    ordered, left, left_count = ordered[low:present], left[low:present], left_count[low:present]
    flipped_left, flipped_count = flipped_left[low:present], flipped_count[low:present]
    running, running_count = 0.0, 0
    if even:
        for p in range(len(ordered)):
            running += gradient[ordered[p] & 0xFFFF]
            left[p] = running
        for p in range(len(ordered)):
            left_count[p] = p + 1
    else:
        for p in range(len(ordered)):
            row = ordered[p] & 0xFFFF
            running += gradient[row]
            running_count += weight[row]
            left[p] = running
            left_count[p] = running_count
    if lost_count:
        for p in range(len(ordered)):
            flipped_left[p] = left[p] + lost
            flipped_count[p] = left_count[p] + lost_count
        return True
    flipped_count[:] = 0
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def _first_above(gain, low, high, most):
    gain = gain[low:high]
    bits, b = gain.view(np.int32), np.int32(-1)
    for p in range(len(bits)):
        b = max(b, bits[p])
    if b > 0:
        for p in range(len(bits)):
            if bits[p] == b:
                return low + p if gain[p] > most else -1
    return -1


@njit(cache=True, nogil=True, error_model="numpy")
def _last_above(gain, low, high, most):
    gain = gain[low:high]
    bits, b = gain.view(np.int32), np.int32(-1)
    for p in range(len(bits)):
        b = max(b, bits[p])
    if b > 0:
        for p in range(len(bits) - 1, -1, -1):
            if bits[p] == b:
                return low + p if gain[p] > most else -1
    return -1


@njit(cache=True, nogil=True, error_model="numpy")
def _gains(ordered, total, count, whole, left, left_count, l2, min_child_weight, first, last, gain):
    """Fill `gain` with what each split gains, and with -1 where there is none because the next value is the same or a child too light."""
    ordered, total, count, whole = ordered[first:last], total[first:last], count[first:last], whole[first:last]
    left, left_count, gain = left[first:last], left_count[first:last], gain[first:last]
    l2, least = np.float32(l2), np.float32(min_child_weight)
    n = len(gain)
    for p in range(n):
        right, c, d = total[p] - left[p], np.float32(left_count[p]), np.float32(count[p] - left_count[p])
        gained = np.float32(left[p] * left[p]) / (c + l2) + np.float32(right * right) / (d + l2) - whole[p]
        gain[p] = gained if (c >= least) & (d >= least) else np.float32(-1)
    for p in range(n - 1):
        if (ordered[p] ^ ordered[p + 1]) < 65536:
            gain[p] = np.float32(-1)
