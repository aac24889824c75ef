"""The calibrated range of every direction, and which inputs leave it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lmcore.errors import UserError
from lmcore.record import write_atomically

Extremes = Float32[np.ndarray, "inputs roles directions"]
"""Least or greatest cosine over the tokens of one role in an input; a role without tokens has least +inf and greatest -inf."""

EXCEEDANCE = np.dtype(
    [("input", "i8"), ("role", "i1"), ("direction", "i4"), ("side", "i1"), ("value", "f4"), ("bound", "f4"), ("margin", "f4")]
)
"""One direction out of its range in one input. `side` is 0 below, 1 above; `margin` is how far beyond the bound, a cosine."""

_AT_ONCE = 1 << 17  # numbers in one go: temporary arrays stay in the cache of a core


@dataclass(frozen=True)
class Bounds:
    """The range [low, high] of each role and direction; an input outside any of them is flagged.

    `directions` is the digest of the directions that they belong to, `rule` says how they came about. A role that calibration never saw
    has the empty range [+inf, -inf], so an input with that role is flagged. `Calibration.bounds` makes them and states what each
    rule guarantees.

    >>> bounds = Bounds(np.float32([[-0.1, -0.2]]), np.float32([[0.3, 0.2]]), "digest")
    >>> low, high = np.float32([[[-0.1, 0.0]], [[-0.5, 0.0]]]), np.float32([[[0.2, 0.1]], [[0.1, 0.5]]])
    >>> bounds.flags(low, high)
    array([False,  True])
    >>> for one in bounds.exceeded(low, high):
    ...     print(f"input {one['input']}, direction {one['direction']}, side {one['side']}: {one['margin']:.1f} beyond {one['bound']:.1f}")
    input 1, direction 0, side 0: 0.4 beyond -0.1
    input 1, direction 1, side 1: 0.3 beyond 0.2
    """

    low: Float32[np.ndarray, "roles directions"]
    high: Float32[np.ndarray, "roles directions"]
    directions: str
    rule: Mapping[str, Any] = field(default_factory=dict)

    def flags(self, low: Extremes, high: Extremes) -> Bool[np.ndarray, " inputs"]:
        """Whether each input leaves a range: low < self.low or high > self.high for some role and direction.

        Raises: `UserError` for NaN or a shape that is not that of the bounds.
        """
        check_extremes(low, high, self.low.shape)
        rows = _rows(self.low)
        parts = [slice(start, start + rows) for start in range(0, len(low), rows)]
        found = [((low[part] < self.low) | (high[part] > self.high)).any((1, 2)) for part in parts]
        return np.concatenate([np.zeros(0, bool), *found])

    def exceeded(self, low: Extremes, high: Extremes) -> np.ndarray:
        """Every range that is left, as an array of `EXCEEDANCE`: by input, in an input by falling margin."""
        flagged = np.flatnonzero(self.flags(low, high))
        low, high = low[flagged], high[flagged]
        found = np.concatenate(
            [_records(0, low, self.low, low < self.low, flagged), _records(1, high, self.high, high > self.high, flagged)]
        )
        return found[np.lexsort((found["side"], found["direction"], found["role"], -found["margin"], found["input"]))]

    def update(self, low: Extremes, high: Extremes) -> tuple["Bounds", Bool[np.ndarray, " inputs"]]:
        """Flag inputs one after the other and widen the ranges to each before the next: the paper's streaming rule.

        Returns the widened bounds and the flags. Flagged inputs widen too, so an anomaly is flagged at first sight and its like is not.
        With epsilon the ranges widen to the value itself minus or plus epsilon, as if it had been calibrated on.

        A widened range flags a subset of what the frozen one flags, so a rate of false alarms that is bounded for frozen ranges stays
        so bounded; but it falls below the stated level over the stream, p-values of the calibration no longer say which inputs are
        flagged, and an attacker may widen the ranges before the attack. To keep a level, keep the bounds.
        """
        check_extremes(low, high, self.low.shape)
        epsilon = np.float32(self.rule.get("epsilon", 0.0))
        if not len(low):
            return self, np.zeros(0, bool)
        rows = _rows(self.low)
        flags, bounds = [], self
        for start in range(0, len(low), rows):
            part = slice(start, start + rows)
            # Row i of these is the range before input i; the last row is the range after all.
            lows = np.minimum.accumulate(np.concatenate([bounds.low[None], low[part] - epsilon]))
            highs = np.maximum.accumulate(np.concatenate([bounds.high[None], high[part] + epsilon]))
            flags.append(((low[part] < lows[:-1]) | (high[part] > highs[:-1])).any((1, 2)))
            bounds = replace(bounds, low=lows[-1], high=highs[-1])
        return bounds, np.concatenate(flags)

    def save(self, path: Path) -> None:
        """Write the bounds as safetensors, whole or not at all."""
        write_state(
            path, "bounds", {"low": self.low, "high": self.high}, {"directions": self.directions, "rule": dict(self.rule)}
        )

    @classmethod
    def load(cls, path: Path, *, directions: str) -> "Bounds":
        """Read bounds of the directions with this digest. Raises: `UserError` for another file, or bounds of other directions."""
        arrays, facts = read_state(path, "bounds", directions)
        return cls(arrays["low"], arrays["high"], directions, facts["rule"])


@dataclass(frozen=True)
class Scores:
    """One number per input, how far outside it lies, and its conformal p-value.

    score(x) = max over roles, directions and sides of z - furthest, a cosine: z is minus the least or plus the greatest of the input, and
    `furthest` the largest z in one half of the calibration, the scaling half (-inf for a role it never had). Of the other, the scored
    half of `inputs` inputs, `largest` holds in falling order all scores above `exact_above`, and of those equal to it some; `sample` holds
    those of a random sample, for `Drift`.

    Distances are not divided by the spread of a direction: where cosines of normal inputs hardly vary, one that leaves their range a
    little is not strange.
    """

    furthest: Float64[np.ndarray, "roles directions 2"]
    inputs: int
    largest: Float64[np.ndarray, " largest"]
    exact_above: float
    sample: Float64[np.ndarray, " sample"]

    def of(self, low: Extremes, high: Extremes) -> Float64[np.ndarray, " inputs"]:
        """Score inputs. A role that the scaling half never had scores +inf. Raises: `UserError` as `Bounds.flags`."""
        check_extremes(low, high, self.furthest.shape[:2])
        rows = _rows(self.furthest)
        parts = [self._of(low[start : start + rows], high[start : start + rows]) for start in range(0, len(low), rows)]
        return np.concatenate([np.zeros(0), *parts])

    def p_values(self, scores: Float64[np.ndarray, " inputs"]) -> Float64[np.ndarray, " inputs"]:
        """Conformal p-values: p = (1 + number of calibration scores >= s) / (inputs + 1); 1 for s up to `exact_above`, where it is unknown.

        For an input exchangeable with those of the scored half, P(p <= alpha) <= alpha: marginal, over the calibration as well as the
        input, and per input, not over a stream of them. p <= alpha exactly where the conformal bounds of alpha flag the input (up to one
        unit in the last place of a float32 bound).
        """
        at_least = len(self.largest) - np.searchsorted(self.largest[::-1], scores, side="left")
        return np.where(scores > self.exact_above, (1 + at_least) / (self.inputs + 1), 1.0)

    def _of(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # NaN where a role that was never seen (-inf) has no tokens (-inf)
            sides = [outward - self.furthest[..., side] for side, outward in ((0, -low), (1, high))]
        return np.maximum(*(np.fmax.reduce(side.reshape(len(low), -1), axis=1, initial=-np.inf) for side in sides))


def _rows(of: np.ndarray) -> int:
    """How many inputs to take at once, each with as many numbers as this array."""
    return max(1, _AT_ONCE // of.size)


def check_extremes(low: np.ndarray, high: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse extremes that no input can have. Raises: `UserError` that names the first input at fault."""
    if low.shape != high.shape or low.shape[1:] != shape:
        wanted = "x".join(map(str, shape))
        raise UserError(
            f"extremes have shapes {low.shape} and {high.shape}, the calibration is of (inputs, roles, directions) = n x {wanted}"
        )
    nan = np.isnan(low).any((1, 2)) | np.isnan(high).any((1, 2))
    if nan.any():
        raise UserError(
            f"input {nan.argmax()} of {len(nan)} has a cosine that is NaN: the model overflows on it, load it in float32 or bfloat16"
        )


def write_state(path: Path, kind: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and JSON facts as one safetensors file with a checksum, a function of its content alone."""
    arrays, facts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"kind": kind, **facts}
    # One entry: several would be written in an order that changes from run to run.
    metadata = {"weightwatch": json.dumps({**facts, "checksum": _checksum(arrays, facts)}, sort_keys=True)}
    write_atomically(path, save(arrays, metadata))


def read_state(path: Path, kind: str, directions: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_state` wrote. Raises: `UserError` for a file that is missing, damaged, of another kind or of other directions."""
    try:
        data = path.read_bytes()
        arrays = load(data)
        facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["weightwatch"])
        if facts.pop("checksum") != _checksum(arrays, facts):
            raise ValueError("its checksum is another")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a file of weightwatch ({type(error).__name__}: {error})") from None
    if facts["kind"] != kind:
        raise UserError(f"{path} holds {facts['kind']}, not {kind}")
    if directions is not None and facts["directions"] != directions:
        raise UserError(
            f"{path} belongs to directions {facts['directions'][:12]}, not {directions[:12]}: use the directions it was made with, "
            "or calibrate anew with these"
        )
    return arrays, facts


def _checksum(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    total = hashlib.blake2b(json.dumps(facts, sort_keys=True, allow_nan=False).encode(), digest_size=8)
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return total.hexdigest()


def _records(side: int, values: np.ndarray, bounds: np.ndarray, outside: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    row, role, direction = np.nonzero(outside)
    found = np.empty(len(row), EXCEEDANCE)
    found["input"], found["role"], found["direction"], found["side"] = inputs[row], role, direction, side
    found["value"], found["bound"] = values[outside], bounds[role, direction]
    found["margin"] = np.abs(found["value"] - found["bound"])
    return found
