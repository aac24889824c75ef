"""Many tiny gradient-boosted forests, fitted together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int16, Integer, UInt8

from lmcore.dispatch import pick
from scaling_meta.ops.bins import Bins
from scaling_meta.ops.forest_shap import forest_shap


@dataclass(frozen=True)
class Forests:
    """Fitted forests, all of `trees` trees. Nodes lie in heap order: the children of node i are 2 i + 1 and 2 i + 2.

    base: what is predicted before the first tree
    feature, threshold, missing_left: a row goes left if its code in the feature is below the threshold, or missing where `missing_left`;
      feature is -1 in leaves and where there is no node
    value: of leaves, learning rate included; 0 elsewhere
    cover: how many training rows reached the node
    """

    base: Float32[np.ndarray, "models"]
    feature: Int16[np.ndarray, "models trees nodes"]
    threshold: UInt8[np.ndarray, "models trees nodes"]
    missing_left: Bool[np.ndarray, "models trees nodes"]
    value: Float32[np.ndarray, "models trees nodes"]
    cover: Float32[np.ndarray, "models trees nodes"]

    def prefix(self, trees: int) -> "Forests":
        """Return the forests as they were after their first `trees` trees."""
        if not 0 <= trees <= self.feature.shape[1]:
            raise ValueError(f"trees is {trees}: expected 0 to {self.feature.shape[1]}")
        arrays = (self.feature, self.threshold, self.missing_left, self.value, self.cover)
        return Forests(self.base, *(array[:, :trees] for array in arrays))

    def predict(
        self, codes: UInt8[np.ndarray, "rows features"], trees: int | None = None
    ) -> Float32[np.ndarray, "models rows"]:
        """Return what each model, or its first `trees` trees, predicts for each row; `codes` as `Bins.codes` or from `Bins.encode`."""
        some = self if trees is None else self.prefix(trees)
        arrays = (some.base, some.feature, some.threshold, some.missing_left, some.value)
        prediction: Float32[np.ndarray, "models rows"] = pick(__name__, codes).predict(codes, *arrays)
        return prediction

    def shap(self, codes: UInt8[np.ndarray, "rows features"]) -> Float32[np.ndarray, "models rows features_and_expectation"]:
        """Return what each feature adds to each prediction, and last the expectation (`ops.forest_shap`)."""
        return forest_shap(self, codes)


def boost(
    bins: Bins,
    y: Float[np.ndarray, "targets rows"],
    rows: Bool[np.ndarray, "models rows"] | UInt8[np.ndarray, "models rows"],
    columns: Bool[np.ndarray, "models features"],
    target: Integer[np.ndarray, "models"] | None = None,
    *,
    depth: int | Int[np.ndarray, "models"] = 3,
    learning_rate: float | Float[np.ndarray, "models"] = 0.1,
    trees: int = 100,
    l2: float = 1.0,
    min_child_weight: float = 1.0,
) -> Forests:
    """Fit one forest per model to squared error, tree by tree as xgboost does with `tree_method="hist"`.

    A model is trained on the rows where `rows` is true (or as many times as it says), on the features where `columns` is true, to predict
    `y[target]` (the first target if None). Labels are float32, as are gradients (prediction - label); their sums G and H per node are
    double. A split of a node gains `G_l² / (H_l + l2) + G_r² / (H_r + l2) - G² / (H + l2)`, in float32, and must gain more than 1e-6; of
    splits that gain the same the one of the lowest feature, lowest threshold and missing values on the right is taken. A leaf is
    `-G / (H + l2) * learning_rate`. The prediction starts from the mean label. Trees, hence predictions, are those of `xgboost.train`
    on the same rows and features, bit for bit where sums are exact (which they are unless gradients span more than 29 binary orders).

    The work is one walk over rows x features per level of a tree; the state of a model, about 8 bytes per row and feature, fits into the
    first-level cache, so that the limit is arithmetic: some 10 instructions per row, feature and level.

    >>> from scaling_meta.ops.bins import binned
    >>> bins = binned(np.array([[1.0], [2.0], [3.0], [4.0]]))
    >>> forests = boost(bins, np.array([[0.0, 0.0, 1.0, 1.0]]), np.ones((1, 4), bool), np.ones((1, 1), bool), depth=1, learning_rate=1.0)
    >>> forests.predict(bins.codes).round(3)
    array([[0., 0., 1., 1.]], dtype=float32)

    Raises: `ValueError` if a shape does not fit, a model has no row or no feature, or a label of a training row is not finite.
    Source: XGBoost, Chen and Guestrin 2016, §2-3; the grid of the paper's §A.4 is depth 2, 3, 5, rate 0.01, 0.1, 0.3, trees 50, 100.
    """
    arguments = _checked(bins, y, rows, columns, target, depth, learning_rate)
    return Forests(*pick(__name__, bins.codes).boost(bins, *arguments, trees, l2, min_child_weight))


def held_out_errors(
    bins: Bins,
    y: Float[np.ndarray, "targets rows"],
    rows: Bool[np.ndarray, "models rows"] | UInt8[np.ndarray, "models rows"],
    held_out: Bool[np.ndarray, "models rows"],
    columns: Bool[np.ndarray, "models features"],
    target: Integer[np.ndarray, "models"] | None = None,
    *,
    depth: int | Int[np.ndarray, "models"] = 3,
    learning_rate: float | Float[np.ndarray, "models"] = 0.1,
    prefixes: Sequence[int] = (100,),
    l2: float = 1.0,
    min_child_weight: float = 1.0,
) -> Float[np.ndarray, "models prefixes"]:
    """Return the mean absolute error of each model on its rows in `held_out`, after as many trees as each of `prefixes` says.

    The models are those of `boost`, grown to the longest prefix, but no tree is kept: a million models need no more memory than one.

    Raises: `ValueError` as `boost` does, or if a model has no row to be tested on or a label there is not finite.
    """
    arguments = _checked(bins, y, rows, columns, target, depth, learning_rate)
    _expect("held_out", held_out, arguments[1].shape)
    _check_labels("held_out", held_out, y, arguments[3])
    labels, rows, *others = arguments
    tested = (labels, rows, np.ascontiguousarray(held_out), *others, tuple(prefixes), l2, min_child_weight)
    result: Float[np.ndarray, "models prefixes"] = pick(__name__, bins.codes).errors(bins, *tested)
    return result


def _checked(bins, y, rows, columns, target, depth, learning_rate):  # type: ignore[no-untyped-def]
    """Return the arguments as the back ends take them: contiguous, one depth and learning rate per model."""
    models, size = rows.shape[0], bins.codes.shape
    target = np.zeros(models, np.int64) if target is None else target.astype(np.int64)
    _expect("y", y, (len(y), size[0]))
    _expect("rows", rows, (models, size[0]))
    _expect("columns", columns, (models, size[1]))
    _expect("target", target, (models,))
    if size[0] > 2**16 or size[1] >= 2**15:
        raise ValueError(f"codes are {size}: expected at most {2**16} rows and fewer than {2**15} features")
    if models and not 0 <= target.min() <= target.max() < len(y):
        raise ValueError(f"target goes from {target.min()} to {target.max()}: expected 0 to {len(y) - 1}")
    empty = np.flatnonzero(~columns.any(1))
    if len(empty):
        raise ValueError(f"model {empty[0]} has no feature: columns[{empty[0]}] is false everywhere")
    _check_labels("rows", rows, y, target)
    depth = np.broadcast_to(np.asarray(depth, np.int64), (models,))
    if models and not 1 <= depth.min() <= depth.max() <= 12:
        raise ValueError(f"depth goes from {depth.min()} to {depth.max()}: expected 1 to 12")
    rate = np.broadcast_to(np.asarray(learning_rate, np.float32), (models,))
    arrays = (y.astype(np.float64), rows.astype(np.uint8), columns, target, depth, rate)
    return tuple(np.ascontiguousarray(array) for array in arrays)


def _check_labels(name, mask, y, target):  # type: ignore[no-untyped-def]
    for model in np.flatnonzero(~mask.any(1)):
        raise ValueError(f"model {model} has no row in {name}")
    known = np.isfinite(y)
    for model, row in np.argwhere((mask > 0) & ~known[target])[:1]:
        raise ValueError(f"y[{target[model]}, {row}] is {y[target[model], row]}, but row {row} is in {name} of model {model}")


def _expect(name, array, shape):  # type: ignore[no-untyped-def]
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}: expected {shape}")
