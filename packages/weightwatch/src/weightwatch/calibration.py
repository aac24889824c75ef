"""What normal inputs do: a small state, the same bytes in whatever order and on however many processes the inputs came."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64

from lmcore.errors import UserError
from weightwatch.bounds import Bounds, Extremes, Scores, check_extremes, read_state, write_state
from weightwatch.conversations import ROLES

Rule = Literal["minmax", "percentile", "conformal"]

_LARGEST = 1.01  # a cosine in bfloat16 may be a little above 1


class Calibration:
    """The cosines of normal inputs, as much of them as the rules need.

    Per role, direction and side (below: minus the least cosine of an input; above: the greatest; so larger is always further out) it holds

    - the `tail` largest values over all inputs, each with a 64-bit hash of its input's id (equal values in the order of the hashes);
    - the largest value over the scaling half, the inputs with an even hash;

    and whole, for the `sample` inputs of the scored half (odd hashes) with the smallest hashes, all values: a uniform random sample.
    Hashes are BLAKE2b of the id alone, so the halves and the sample do not depend on what an input says. Every part is a function of
    the set of inputs: any order, chunking and merging give the same file, byte for byte. With t directions and two roles it takes
    48 t tail + 16 t sample + 16 t bytes: 7.8 MB for t = 1080 and the defaults, for ten inputs or ten million.

    **Going on after a kill.** Add inputs in the order of their file and `save` after each chunk (atomic). `load` and `resume(ids)` then
    say how many of the file's first inputs are in, having checked it by the sum of their hashes; no list of ids is kept. Workers each
    take a part of the file and a state of their own; `merge` joins the parts when all are done.

    >>> calibration = Calibration("digest of the directions", 3)
    >>> cosines = np.random.default_rng(0).normal(0, 0.1, (200, 2, 2, 3)).astype(np.float32)
    >>> calibration.add([f"chat {i}" for i in range(200)], cosines.min(1), cosines.max(1))
    >>> bounds = calibration.bounds("conformal", 0.05)
    >>> bounds.low.shape, bounds.rule["fpr_bound"] <= 0.05
    ((2, 3), True)
    """

    def __init__(self, directions: str, count: int, *, tail: int = 64, sample: int = 256):
        if count < 1 or tail < 1 or sample < 0:
            raise ValueError(f"{count} directions, tail {tail}, sample {sample}: too few")
        shape = (len(ROLES), count, 2)
        self.directions = directions
        self.inputs = 0
        self.fingerprint = 0  # sum of the hashes of all ids, modulo 2^64
        self.inputs_with_role = np.zeros(len(ROLES), np.int64)
        self.scaling_inputs = np.zeros(len(ROLES), np.int64)  # of the scaling half, with this role
        self.scored_inputs = 0
        self.furthest = np.full(shape, -np.inf, np.float32)  # of the scaling half
        self.tail = np.full((*shape, tail), -np.inf, np.float32)  # falling
        self.tail_hashes = np.zeros((*shape, tail), np.uint64)
        self.sample = np.zeros((0, *shape), np.float32)
        self.sample_hashes = np.zeros(0, np.uint64)  # rising
        self._sample_size = sample

    def add(self, ids: Sequence[str], low: Extremes, high: Extremes) -> None:
        """Add inputs: their ids, and the least and greatest cosine per role and direction (+inf and -inf for a role without tokens).

        Raises: `UserError` for NaN, cosines beyond 1, a shape of other directions, or an id that is seen to be there already (which
        only those in the tails and the sample are: nearly all among the first thousand inputs); then nothing has changed.
        """
        self._check(ids, low, high)
        hashes = _hashes(ids)
        self._refuse_repeats(hashes, "add")
        for start in range(0, len(ids), 1024):  # bounds the memory
            part = slice(start, start + 1024)
            self._add(hashes[part], np.stack([-low[part], high[part]], -1))

    def merge(self, other: "Calibration") -> None:
        """Add the inputs of another calibration.

        Raises: `UserError` if it is of other directions or sizes, or holds inputs that are seen to be in this one too (see `add`).
        """
        if other.directions != self.directions:
            raise UserError(f"calibrations of directions {self.directions[:12]} and {other.directions[:12]} cannot be merged")
        if (other.tail.shape, other._sample_size) != (self.tail.shape, self._sample_size):
            raise UserError(
                "calibrations with another tail or sample cannot be merged: calibrate all parts with the same options"
            )
        self._refuse_repeats(other._known(), "merge")
        self._count(
            other.inputs, other.fingerprint, other.inputs_with_role, other.scaling_inputs, other.scored_inputs, other.furthest
        )
        there = np.isfinite(other.tail.reshape(-1))
        column = np.arange(self.furthest.size).repeat(other.tail.shape[-1])[there]
        self._insert(column, other.tail.reshape(-1)[there], other.tail_hashes.reshape(-1)[there])
        self._draw(other.sample_hashes, other.sample)

    def resume(self, ids: Sequence[str]) -> int:
        """Return how many inputs are in, which are to be the first of `ids`. Raises: `UserError` if they are not."""
        first = _hashes(ids[: self.inputs])
        if len(first) < self.inputs or int(first.sum(dtype=np.uint64)) != self.fingerprint:
            raise UserError(
                f"the calibration holds {self.inputs} inputs that are not the first {self.inputs} of these: "
                "go on with the file it was begun with, or start a new one"
            )
        return self.inputs

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        facts = {name: getattr(self, name) for name in ("directions", "inputs", "fingerprint", "scored_inputs")}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_state(path, "a calibration", arrays, {**facts, "sample_size": self._sample_size})

    @classmethod
    def load(cls, path: Path, *, directions: str) -> "Calibration":
        """Read the state. Raises: `UserError` for another or damaged file, or directions of another digest."""
        arrays, facts = read_state(path, "a calibration", directions)
        _, count, _, tail = arrays["tail"].shape
        calibration = cls(directions, count, tail=tail, sample=facts["sample_size"])
        calibration.inputs, calibration.fingerprint = facts["inputs"], facts["fingerprint"]
        calibration.scored_inputs = facts["scored_inputs"]
        for name in _ARRAYS:
            setattr(calibration, name, arrays[name])
        return calibration

    def bounds(self, rule: Rule = "conformal", level: float | None = None) -> Bounds:
        """Ranges by a rule: `minmax`, `percentile` or `conformal`; `level` is its epsilon, percentile or alpha (default 0.01 each)."""
        rules: dict[str, Callable[..., Bounds]] = {
            "minmax": self.minmax,
            "percentile": self.percentile,
            "conformal": self.conformal,
        }
        return rules[rule]() if level is None else rules[rule](level)

    def minmax(self, epsilon: float = 0.01) -> Bounds:
        """The paper's rule: [least - epsilon, greatest + epsilon] of all inputs, per role and direction.

        Guarantee: let an input be exchangeable with the n_r calibrated inputs that have role r. On one side of one direction it is the
        furthest out of n_r + 1 with probability at most 1 / (n_r + 1), so by the union bound over t directions, two sides and the roles
        the rate of false alarms is at most the sum over roles of 2 t / (n_r + 1): with one role the 2t/n of the paper (Remark 3.1),
        with both on all inputs twice that. It holds for any epsilon >= 0, marginally: on average over calibrations, per input. For
        thousands of directions it says something only for tens of thousands of inputs. Under `Bounds.update` it holds at each step,
        with the n_r seen until then.
        """
        if epsilon < 0:
            raise UserError(f"epsilon is {epsilon}: it must not be negative")
        return self._order_statistic([0] * len(ROLES), {"rule": "minmax", "epsilon": epsilon})

    def percentile(self, percentile: float = 0.01) -> Bounds:
        """Leave out a share of the inputs on each side of each direction: the bound is their value number floor(percentile n_r) + 1.

        `percentile` is a share (0.01 is 1 %). The bound is a value that occurred, never one between two.

        Guarantee: on one side of one direction an exchangeable input exceeds the bound with probability at most
        (floor(percentile n_r) + 1) / (n_r + 1), marginally; the rate over all t directions and two sides is at most 2 t times that,
        summed over roles. So the percentile is a level per side and direction, not the rate of false alarms, which `conformal` sets.

        Raises: `UserError` if the value lies deeper than the tail, naming the tail that is needed.
        """
        if not 0 <= percentile < 1:
            raise UserError(f"percentile is {percentile}: it is a share from 0 to below 1, say 0.001")
        left_out = [math.floor(percentile * int(n) + 1e-9) for n in self.inputs_with_role]
        return self._order_statistic(left_out, {"rule": "percentile", "percentile": percentile})

    def conformal(self, alpha: float = 0.01) -> Bounds:
        """Split-conformal ranges: those of the scaling half widened by q, the k-th largest of the n scores of the other half.

        k = floor(alpha (n + 1)), and a score is by how much an input leaves the range of the scaling half at most (`Scores`): so this is
        the min/max rule with the epsilon that gives the rate alpha; q is negative where that range itself is left by fewer.

        Guarantee: an input that is exchangeable with the n inputs of the scored half is flagged with probability at most k / (n + 1) <=
        alpha, whatever the distribution and however the directions depend on each other; with continuous scores it is equal to
        k / (n + 1). It needs n >= 1/alpha - 1 (half of the inputs are in n). It is marginal: over calibrations. The rate of
        one given calibration is itself random, Beta(k, n + 1 - k) distributed (`planning.calibration_size` plans for that). It is per
        input: of N inputs with the same calibration alpha N are flagged on average. It does not hold for inputs of another distribution
        (watch for them with `Drift`). Under `Bounds.update` the rate is below alpha by an unknown amount.

        Bounds are rounded outward to float32. Raises: `UserError` if there are too few inputs for alpha, or the tail is too short for the
        k-th score to be known exactly.
        """
        if not 0 < alpha < 1:
            raise UserError(f"alpha is {alpha}: the rate of false alarms lies between 0 and 1")
        scores = self.scores()
        n, k = scores.inputs, math.floor(alpha * (scores.inputs + 1) + 1e-9)  # 1e-9: 0.07 * 100 is below 7 in float64
        if k < 1:
            least = math.ceil(1 / alpha - 1e-9) - 1
            raise UserError(
                f"alpha {alpha:g} needs {least} scored inputs, this calibration has {n} of {self.inputs}: "
                f"calibrate on about {2 * least + 2} inputs or more, or raise alpha to {1 / (n + 1):.3g}"
            )
        if k > len(scores.largest):
            raise UserError(
                f"alpha {alpha:g} needs the {k} largest scores of {n}, but a tail of {self.tail.shape[-1]} tells only "
                f"{len(scores.largest)}: calibrate anew with a tail of {3 * k}, or lower alpha"
            )
        quantile = scores.largest[k - 1]
        with np.errstate(invalid="ignore"):  # -inf + inf
            outward = np.where(quantile == np.inf, np.inf, scores.furthest + quantile)
        facts = {"alpha": alpha, "scored_inputs": n, "rank": k, "fpr_bound": k / (n + 1)}
        return self._bounds(_rounded_up(outward), {"rule": "conformal", **facts})

    def scores(self) -> Scores:
        """The range of one half of the inputs, and the scores of the other as far as tails and sample tell them.

        An input outside the tails of some direction lies, in that direction, not above the tail's last value: so scores above the largest
        such value are exact, and of those equal to it some may be missing (inputs that share a template share cosines).

        Raises: `UserError` if either half is empty.
        """
        if not (self.scored_inputs and self.scaling_inputs.any()):
            raise UserError(
                f"the calibration holds {self.inputs} inputs: too few for a range from one half and scores from the other"
            )
        furthest = self.furthest.astype(np.float64)
        scored = np.isfinite(self.tail) & (self.tail_hashes % 2 == 1)
        entries = (
            self.tail[scored] - np.broadcast_to(furthest[..., None], self.tail.shape)[scored]
        )  # +inf for a role never scaled
        _, who = np.unique(self.tail_hashes[scored], return_inverse=True)
        best = np.full(who.max(initial=-1) + 1, -np.inf)
        np.maximum.at(best, who, entries)
        last = self.tail[..., -1]
        full = last > -np.inf  # a tail that is not holds all inputs
        floor = (last[full] - furthest[full]).max(initial=-np.inf)
        largest = np.sort(best[best >= floor])[::-1].copy()
        scores = Scores(furthest, self.scored_inputs, largest, float(floor), np.zeros(0))
        return replace(scores, sample=scores.of(-self.sample[..., 0], self.sample[..., 1]))

    def _check(self, ids: Sequence[str], low: Extremes, high: Extremes) -> None:
        check_extremes(low, high, self.furthest.shape[:2])
        if len(ids) != len(low):
            raise ValueError(f"{len(ids)} ids for {len(low)} inputs")
        if len(set(ids)) < len(ids):
            raise UserError(f"the input {max(ids, key=list(ids).count)!r} is there twice: give each input an id of its own")
        absent = (low == np.inf) & (high == -np.inf)
        wrong = ~absent & ~((low >= -_LARGEST) & (low <= high) & (high <= _LARGEST)) | (absent != absent[..., :1])
        if wrong.any():
            row = int(wrong.any((1, 2)).argmax())
            raise UserError(f"input {ids[row]!r} has extremes that are no cosines (least <= greatest, both from -1 to 1)")

    def _refuse_repeats(self, hashes: UInt64[np.ndarray, " inputs"], what: str) -> None:
        again = int(np.isin(hashes, self._known()).sum())
        if again:
            where = "the calibration already" if what == "add" else "both calibrations"
            raise UserError(f"at least {again} of the inputs are in {where}: no input may count twice")

    def _known(self) -> UInt64[np.ndarray, " known"]:
        return np.unique(np.concatenate([self.tail_hashes[np.isfinite(self.tail)], self.sample_hashes]))

    def _add(self, hashes: UInt64[np.ndarray, " inputs"], outward: np.ndarray) -> None:
        has_role = outward[:, :, 0, 0] > -np.inf
        scaling = hashes % 2 == 0
        self._count(
            len(hashes), int(hashes.sum(dtype=np.uint64)), has_role.sum(0), has_role[scaling].sum(0), int((~scaling).sum()),
            outward[scaling].max(0, initial=-np.inf),
        )  # fmt: skip
        self._draw(hashes[~scaling], outward[~scaling])

        flat, tail = outward.reshape(len(hashes), -1), self.tail.shape[-1]
        enters = self.tail[..., -1].reshape(-1)
        if len(flat) > tail:
            enters = np.maximum(enters, np.partition(flat, len(flat) - tail, 0)[len(flat) - tail])
        row, column = np.nonzero((flat >= enters) & (flat > -np.inf))
        self._insert(column, flat[row, column], hashes[row])

    def _count(self, inputs: int, fingerprint: int, with_role: Any, scaling: Any, scored: int, furthest: Any) -> None:
        self.inputs += inputs
        self.fingerprint = (self.fingerprint + fingerprint) % 2**64
        self.inputs_with_role = self.inputs_with_role + with_role
        self.scaling_inputs = self.scaling_inputs + scaling
        self.scored_inputs += scored
        self.furthest = np.maximum(self.furthest, furthest)

    def _draw(self, hashes: UInt64[np.ndarray, " inputs"], outward: np.ndarray) -> None:
        """Keep the inputs with the smallest hashes in the sample."""
        hashes = np.concatenate([self.sample_hashes, hashes])
        keep = np.argsort(hashes)[: self._sample_size]
        if len(keep) > len(self.sample) or (keep >= len(self.sample)).any():
            self.sample, self.sample_hashes = np.concatenate([self.sample, outward])[keep], hashes[keep]

    def _insert(self, column: np.ndarray, value: np.ndarray, hashes: UInt64[np.ndarray, " entries"]) -> None:
        """Put entries into the tails of their columns (a role, direction and side): by falling value, then rising hash."""
        tail = self.tail.shape[-1]
        values, owners = self.tail.reshape(-1, tail), self.tail_hashes.reshape(-1, tail)  # views
        touched = np.unique(column)
        value = np.concatenate([values[touched].reshape(-1), value])
        hashes = np.concatenate([owners[touched].reshape(-1), hashes])
        column = np.concatenate([np.arange(len(touched)).repeat(tail), np.searchsorted(touched, column)])
        order = np.lexsort((hashes, -value, column))
        first = np.searchsorted(column[order], np.arange(len(touched)))  # every column has at least `tail` entries
        keep = order[first[:, None] + np.arange(tail)]
        values[touched], owners[touched] = value[keep], hashes[keep]

    def _order_statistic(self, left_out: Sequence[int], facts: dict[str, Any]) -> Bounds:
        """Bounds at value number left_out[role] + 1 from outside."""
        if not self.inputs:
            raise UserError("the calibration is empty: calibrate on at least one input")
        tail = self.tail.shape[-1]
        if max(left_out) >= tail:
            raise UserError(
                f"percentile {facts['percentile']:g} of {self.inputs} inputs leaves out {max(left_out)} on each side, "
                f"the calibration keeps a tail of {tail}: calibrate anew with a tail of {max(left_out) + 1}, or lower the percentile"
            )
        outward = np.stack([self.tail[role, ..., rank] for role, rank in enumerate(left_out)]) + np.float32(
            facts.get("epsilon", 0.0)
        )
        seen = [(rank + 1) / (int(n) + 1) for rank, n in zip(left_out, self.inputs_with_role, strict=True) if n]
        return self._bounds(outward, {**facts, "fpr_bound": min(1.0, 2 * self.tail.shape[1] * sum(seen))})

    def _bounds(self, outward: np.ndarray, facts: dict[str, Any]) -> Bounds:
        low, high = -outward[..., 0], outward[..., 1]
        return Bounds(np.ascontiguousarray(low), np.ascontiguousarray(high), self.directions, {**facts, "inputs": self.inputs})


_ARRAYS = ("inputs_with_role", "scaling_inputs", "furthest", "tail", "tail_hashes", "sample", "sample_hashes")


def _hashes(ids: Sequence[str]) -> UInt64[np.ndarray, " inputs"]:
    digests = b"".join(hashlib.blake2b(str(one).encode(), digest_size=8, person=b"weightwatch").digest() for one in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _rounded_up(values: np.ndarray) -> np.ndarray:
    """The smallest float32 that is not below."""
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
