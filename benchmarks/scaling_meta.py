# /// script
# dependencies = []
# ///
"""scaling-meta against xgboost: forests fitted per second on tables of the paper's size, on one core.

`nox -s benchmarks -- scaling_meta`; by hand `PYTHONPATH=scripts python -P`. Writes benchmarks/results/scaling_meta.json. Processor seconds,
ours and theirs alternating; medians over repeats, the spread is the range.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import xgboost

from lmcore.record import environment, write_json
from measuring import RESULTS, show, summary
from scaling_meta.ops.bins import binned
from scaling_meta.ops.forests import boost, held_out_errors

MODELS, ROWS, FEATURES, TREES = 1000, 92, 10, 100


def main() -> None:
    numba.set_num_threads(1)
    measured: dict[str, Any] = {"environment": environment() | {"xgboost": xgboost.__version__, "threads": 1}}
    measured["forests"] = [show(f"depth {depth}", forests(depth)) for depth in (2, 3, 5)]
    write_json(RESULTS / "scaling_meta.json", measured)


def forests(depth: int) -> dict[str, Any]:
    """1,000 models of 100 trees, each on two thirds of 92 rows: their errors on the other third, as selection needs them."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(ROWS, FEATURES))
    values[generator.random(values.shape) < 0.2] = np.nan
    y = np.tanh(np.nan_to_num(values[:, 0])) + 0.1 * generator.normal(size=ROWS)
    train = generator.random((MODELS, ROWS)) < 2 / 3
    columns, few = np.ones((MODELS, FEATURES), bool), 50

    def ours() -> np.ndarray:
        return held_out_errors(
            binned(values), y[None], train, ~train, columns, depth=depth, learning_rate=0.1, prefixes=(TREES // 2, TREES)
        )

    def theirs() -> np.ndarray:
        options = {"tree_method": "hist", "max_depth": depth, "eta": 0.1, "nthread": 1}
        errors = []
        for one in train[:few]:
            booster = xgboost.train(options, xgboost.DMatrix(values[one], y[one], nthread=1), TREES)
            errors.append(np.abs(booster.predict(xgboost.DMatrix(values[~one], nthread=1)) - y[~one]).mean())
        return np.array(errors)

    difference = np.abs(ours()[:few, 1] - theirs()).max()
    mine, others = [], []
    for _ in range(5):
        mine.append(MODELS / processor_seconds(ours))
        others.append(few / processor_seconds(theirs))
    kept = boost(binned(values), y[None], train, columns, depth=depth, learning_rate=0.1, trees=TREES)
    codes = binned(values).codes
    return {
        "depth": depth, "models": MODELS, "rows": ROWS, "features": FEATURES, "trees": TREES,
        "scaling_meta_fits_per_second": summary(mine), "xgboost_fits_per_second": summary(others),
        "times_faster": statistics.median(mine) / statistics.median(others), "largest_difference_of_errors": float(difference),
        "shap_forests_per_second": MODELS / processor_seconds(lambda: kept.shap(codes)),
    }  # fmt: skip


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
