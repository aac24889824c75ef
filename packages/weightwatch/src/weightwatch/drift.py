"""An alarm when the inputs are no longer like those of the calibration, on which every guarantee rests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from lmcore.errors import UserError
from weightwatch.bounds import read_state, write_state


@dataclass(frozen=True)
class Alarm:
    """A block of inputs, numbered from 0, whose scores are distributed otherwise than those of the calibration."""

    block: int
    statistic: float
    p_value: float


class Drift:
    """Compares each block of `block` consecutive scores with the calibration's by the two-sample Kolmogorov-Smirnov test.

    An alarm: D = max |F_block - F_calibration| has an exact p-value of at most `level`. While inputs are exchangeable with those of the
    scored half of the calibration, a block raises a false alarm with probability at most `level`, marginally over calibration and block
    (blocks share the calibration, so over one long stream false alarms may come together). It notices a change of many inputs, not a few
    anomalies: those are what the bounds flag. With 256 against 100 scores and level 0.001 the alarm needs D of about 0.23.

    `calibration` is `Scores.sample`. The state is these scores and less than a block of others: `save` it with the stream.

    >>> generator = np.random.default_rng(0)
    >>> drift = Drift(generator.normal(size=256))
    >>> drift.add(generator.normal(size=150)), drift.add(generator.normal(1.0, size=150))
    ([], [Alarm(block=1, statistic=0.25..., p_value=0.0001...), Alarm(block=2, statistic=0.41..., p_value=2.1...e-11)])
    """

    def __init__(self, calibration: Float64[np.ndarray, " scores"], *, block: int = 100, level: float = 0.001):
        if not (len(calibration) and block >= 1 and 0 < level < 1):
            raise UserError(
                f"drift needs calibration scores (got {len(calibration)}), a block (got {block}) and a level in (0, 1)"
            )
        if _least_p_value(len(calibration), block) > level:
            raise UserError(
                f"blocks of {block} against {len(calibration)} calibration scores never reach level {level:g}: "
                "take larger blocks, calibrate on more inputs or raise the level"
            )
        self.calibration, self.block, self.level = np.sort(calibration), block, level
        self.blocks = 0
        self.recent = np.zeros(0)

    def add(self, scores: Float64[np.ndarray, " inputs"]) -> list[Alarm]:
        """Add scores in the order of the stream; returns the alarms of the blocks that they complete."""
        from scipy.stats import ks_2samp

        if np.isnan(scores).any():
            raise UserError("a score is NaN: drift takes the numbers that Scores.of returns")
        self.recent = np.concatenate([self.recent, scores])
        alarms = []
        while len(self.recent) >= self.block:
            test = ks_2samp(self.recent[: self.block], self.calibration, method="exact")
            if test.pvalue <= self.level:
                alarms.append(Alarm(self.blocks, float(test.statistic), float(test.pvalue)))
            self.recent = self.recent[self.block :]
            self.blocks += 1
        return alarms

    def save(self, path: Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        facts = {"block": self.block, "level": self.level, "blocks": self.blocks}
        write_state(path, "a drift alarm", {"calibration": self.calibration, "recent": self.recent}, facts)

    @classmethod
    def load(cls, path: Path) -> "Drift":
        """Read a state, to go on with the stream. Raises: `UserError` for another or damaged file."""
        arrays, facts = read_state(path, "a drift alarm")
        drift = cls(arrays["calibration"], block=facts["block"], level=facts["level"])
        drift.recent, drift.blocks = arrays["recent"], facts["blocks"]
        return drift


def _least_p_value(calibration: int, block: int) -> float:
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.zeros(block), np.ones(calibration), method="exact").pvalue)
