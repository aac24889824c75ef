"""Cross-validation: every prediction is of a model that was not in the fit, nor in the choice of its settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.inference import Estimate
from scaling_meta.metrics import METRICS, decision_accuracy
from scaling_meta.regressors import Regressor
from scaling_meta.splits import Split, family_numbers
from scaling_meta.table import Table


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Predictions of held-out models.

    y, families: the true score and the family of each model
    splits: what was held out, in the order it was
    predictions: of each repeat; NaN for models that the repeat did not test
    """

    y: Float64[np.ndarray, " models"]
    families: tuple[str, ...]
    splits: tuple[Split, ...]
    predictions: Float64[np.ndarray, "repeats models"]

    @property
    def fold_errors(self) -> Float64[np.ndarray, " splits"]:
        """The mean absolute error on the test models of each split."""
        return np.array([np.abs(self.predictions[one.repeat] - self.y)[one.test].mean() for one in self.splits])

    @property
    def model_errors(self) -> Float64[np.ndarray, " models"]:
        """The absolute error of each model, averaged over the repeats that tested it; NaN if none did."""
        errors = np.abs(self.predictions - self.y)
        tested = ~np.isnan(errors)
        return np.where(tested.any(0), np.nansum(errors, 0) / np.maximum(tested.sum(0), 1), np.nan)

    @property
    def train(self) -> float:
        """Models in a training set, on average."""
        return float(np.mean([len(one.train) for one in self.splits]))

    @property
    def test(self) -> float:
        """Models in a test set, on average."""
        return float(np.mean([len(one.test) for one in self.splits]))

    def metrics(self, stderr: Float64[np.ndarray, " models"] | None = None) -> dict[str, float]:
        """Each of `METRICS` over the tested models of a repeat, averaged over the repeats.

        With the standard errors of the scores also `clear_decision_accuracy`, of the pairs that are further apart than these.
        """
        rows = [np.flatnonzero(~np.isnan(one)) for one in self.predictions]
        found = {name: self._mean(METRICS[name], rows) for name in METRICS}
        if stderr is not None:
            clear = [
                decision_accuracy(self.y[some], one[some], stderr[some])
                for some, one in zip(rows, self.predictions, strict=True)
            ]
            found["clear_decision_accuracy"] = float(np.mean(clear))
        return found

    def interval(self, metric: str = "mae", resamples: int = 500, level: float = 0.95, seed: int = 0) -> Estimate:
        """One of the metrics with percentiles over resampled families, drawn with replacement and whole: siblings are not independent."""
        family = family_numbers(self.families)
        members = [np.flatnonzero(family == number) for number in range(family.max() + 1)]
        tested = ~np.isnan(self.predictions)
        generator, values = np.random.default_rng(seed), []
        for _ in range(resamples):
            drawn = np.concatenate([members[number] for number in generator.integers(len(members), size=len(members))])
            values.append(self._mean(METRICS[metric], [drawn[rows[drawn]] for rows in tested]))
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(
            self._mean(METRICS[metric], [np.flatnonzero(rows) for rows in tested]), (float(low), float(high), level)
        )

    def _mean(self, metric: Callable[[np.ndarray, np.ndarray], float], rows: Sequence[np.ndarray]) -> float:
        values = [metric(self.y[some], one[some]) for some, one in zip(rows, self.predictions, strict=True) if len(some)]
        return float(np.mean(values)) if values else float("nan")


def cross_validate(
    table: Table, y: Float64[np.ndarray, " models"], regressor: Regressor, splits: Sequence[Split]
) -> CrossValidation:
    """Fit to the training models of each split, and predict its test models.

    A regressor that searches for its settings does so inside `fit`, so inside the training models: the cross-validation is nested.
    Raises: `UserError` if a score is missing or a test set empty (see `scored`).
    """
    if np.isnan(y).any():
        raise UserError(f"{table.models[int(np.isnan(y).argmax())]} has no score: leave it out before the models are divided")
    predictions = np.full((1 + max(one.repeat for one in splits), len(table)), np.nan)
    for one in splits:
        fitted = regressor.fit(table.rows(one.train), y[one.train])
        predictions[one.repeat, one.test] = fitted.predict(table.rows(one.test))
    return CrossValidation(y, table.families, tuple(splits), predictions)
