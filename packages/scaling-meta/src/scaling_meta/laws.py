"""Scaling laws of scores: monotone curves between a floor and a ceiling, in size and data or in compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from scaling_meta.table import Table

Curve = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of parameters and of inputs [n, k]: the height between floor (0) and ceiling (1) [n], and its derivatives [n, parameters]."""

_OUTLIER = 0.05  # from this error on (in units of the score) a model counts less than by its square: the loss is soft L1


@dataclass(frozen=True)
class PowerLaw:
    """score = floor + (ceiling - floor) exp(-(A N^-a + B D^-b)), of size N and tokens D; all six parameters are fitted.

    The exponent is the loss of Hoffmann et al. 2022 (eq. 10) without its constant, which is in the ceiling; the exponential map to the
    error of a task is that of Gadre et al. 2024 (eq. 5: error = epsilon - k exp(-gamma L)). The fit starts from several points and
    minimises the soft L1 loss of errors beyond 0.05 (Hoffmann et al. take Huber's for the same end): floor and ceiling lie within
    `bounds`, the range of the score, and either may be the higher one, so that scores may also fall with scale.
    """

    bounds: tuple[float, float] = (0.0, 1.0)

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedLaw":
        """Fit on models with known size and tokens. Raises: `UserError` where one of them is missing."""
        inputs = _known(np.stack([table.column("log_params"), table.column("log_tokens")], axis=1), table)
        starts = [[scale, power, scale, power] for power in (0.2, 0.6) for scale in (-1.5, -0.5)]
        return _fit(_exponential, inputs, y, starts, ([-12.0, 0.0] * 2, [5.0, 2.0] * 2), self.bounds)


@dataclass(frozen=True)
class Sigmoid:
    """score = floor + (ceiling - floor) sigmoid(slope ln C + shift), of the training compute C = 6 N D; slope >= 0, fitted as `PowerLaw`.

    Source: Ruan, Maddison and Hashimoto 2024 (observational scaling laws), eq. 1 and section 3, with a floor that is fitted too.
    """

    bounds: tuple[float, float] = (0.0, 1.0)

    def fit(self, table: Table, y: Float64[np.ndarray, " models"]) -> "FittedLaw":
        """Fit on models with known size and tokens. Raises: `UserError` where one of them is missing."""
        starts = [[slope, shift] for slope in (0.3, 1.0) for shift in (-2.0, 0.0)]
        return _fit(_logistic, _known(table.flops[:, None], table), y, starts, ([0.0, -20.0], [5.0, 20.0]), self.bounds)


@dataclass(frozen=True, eq=False)
class FittedLaw:
    """A curve with its parameters: `center` is subtracted from the logarithms, `shape` is the curve's own."""

    curve: Curve
    center: Float64[np.ndarray, " inputs"]
    shape: Float64[np.ndarray, " parameters"]
    floor: float
    ceiling: float

    def predict(self, table: Table) -> Float64[np.ndarray, " models"]:
        """The law's score of each model. Raises: `UserError` where size or tokens are missing."""
        inputs = [table.flops] if len(self.center) == 1 else [table.column("log_params"), table.column("log_tokens")]
        height, _ = self.curve(self.shape, _known(np.stack(inputs, axis=1), table) - self.center)
        return self.floor + (self.ceiling - self.floor) * height


def _exponential(shape: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(-sum_k exp(scale_k - power_k x_k))."""
    scale, power = shape[0::2], shape[1::2]
    losses = np.exp(scale - power * inputs)
    height = np.exp(-losses.sum(1))
    slopes = -height[:, None] * losses
    return height, np.stack([slopes, -slopes * inputs], axis=2).reshape(len(inputs), -1)


def _logistic(shape: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / (1 + exp(-(slope x + shift)))."""
    from scipy.special import expit

    height = expit(shape[0] * inputs[:, 0] + shape[1])
    slope = (height * (1 - height))[:, None]
    return height, np.concatenate([slope * inputs, slope], axis=1)


def _fit(
    curve: Curve,
    inputs: np.ndarray,
    y: np.ndarray,
    starts: Sequence[Sequence[float]],
    limits: tuple[Sequence[float], Sequence[float]],
    bounds: tuple[float, float],
) -> FittedLaw:
    """The best of the fits from `starts`, each with the ceiling at the best score and half a range beyond; the first of equal ones."""
    from scipy.optimize import least_squares

    center = inputs.mean(0)
    x, scale = inputs - center, np.sort(y)
    first, last = (scale[0], scale[-1]) if x.sum(1) @ (y - y.mean()) >= 0 else (scale[-1], scale[0])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        *shape, floor, ceiling = parameters
        return floor + (ceiling - floor) * curve(np.array(shape), x)[0] - y

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        *shape, floor, ceiling = parameters
        height, slopes = curve(np.array(shape), x)
        return np.concatenate([(ceiling - floor) * slopes, 1 - height[:, None], height[:, None]], axis=1)

    low, high = ([*limit, bound, bound] for limit, bound in zip(limits, bounds, strict=True))
    fits = [
        least_squares(
            residuals, np.clip([*start, first, last + beyond * (last - first)], np.array(low) + 1e-9, np.array(high) - 1e-9),
            jac=jacobian, bounds=(low, high), loss="soft_l1", f_scale=_OUTLIER, max_nfev=200,
        )
        for start in starts
        for beyond in (0.0, 0.5)
    ]  # fmt: skip
    *shape, floor, ceiling = min(fits, key=lambda fit: round(float(fit.cost), 9)).x
    return FittedLaw(curve, center, np.array(shape), float(floor), float(ceiling))


def _known(inputs: Float64[np.ndarray, "models inputs"], table: Table) -> Float64[np.ndarray, "models inputs"]:
    unknown = np.isnan(inputs).any(1)
    if unknown.any():
        model = table.models[int(unknown.argmax())]
        raise UserError(
            f"{model}: params or tokens_billions is missing, which a scaling law needs: add it or leave the model out"
        )
    return inputs
