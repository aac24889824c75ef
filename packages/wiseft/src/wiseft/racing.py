"""A race of candidates over the same problems: who is shown not to be the best leaves, and the best rarely does."""

import numpy as np
from jaxtyping import Float

BETS = (np.arange(10) + 0.5) / 10
"""The stakes λ in (0, 1), of which every wealth is the average: none has to be tuned to differences not yet seen."""


class Race:
    """Candidates are measured on the same problems, round by round, and leave when they are shown not to be the best.

    `x_j,t` in [0, 1] estimates the Pass@k of candidate j on problem t without bias. Problems come in random order and stand for all
    the problems that matter: the best candidate is the one of the highest mean over those. Against each candidate j one
    bets, problem by problem, that the leader beats it: the one with the highest sum so far among the others still running.

        d_t = x_leader,t - x_j,t        W_j = average over λ of Π_t (1 + λ d_t)

    The leader is known before the problem is, so if j is the best, no bet gains on average: its wealth `W_j` starts at 1, is a
    nonnegative supermartingale, and ever reaches 1/α with probability at most α (Ville). Candidate j leaves when `W_j` has reached
    1/α. Hence the guarantee: *the best candidate leaves with probability at most α = 1 - level*, whenever one looks,
    however few the problems and whatever their distribution. Neither looks nor candidates call for a correction: a look is free
    under Ville's inequality, and only one elimination, that of the best, is an error, which one wealth tests. (Of several
    candidates that are equally best, each has this guarantee.) A t test has no such guarantee here: differences are mostly 0 with a
    few large ones, and a handful of equal ones has no variance at all.

    With a `tolerance` > 0 the race also ends when the leader i is shown to be at most that much worse than every other candidate
    running: the same wealth with `d_t = x_i,t - x_j,t + tolerance` has reached (candidates - 1)/α, a Bonferroni correction, since i was
    picked by looking. The two claims then share the error: α is half of 1 - level in each.

    >>> race = Race(candidates=3)
    >>> race.update(np.tile([0.9, 0.8, 0.1], (8, 1)))
    >>> race.running, race.leader, race.eliminated
    ([0, 1], 0, {2: 1})

    Source: Ville 1939; Waudby-Smith and Ramdas 2023 (betting on means); Cover 1991 (averaging over λ).
    """

    def __init__(self, candidates: int, *, level: float = 0.95, tolerance: float = 0.0):
        self.tolerance = tolerance
        self.running = list(range(candidates))
        self.eliminated: dict[int, int] = {}
        """The round, from 1, in which a candidate left."""
        self.rounds = 0
        self._error = (1 - level) / (2 if tolerance else 1)
        self._estimates = np.empty((0, candidates))
        self._gains = np.empty((0, candidates))

    def update(self, estimates: Float[np.ndarray, "problems candidates"]) -> None:
        """Take one more round; the columns of candidates that have left are not read."""
        running = self.running
        block = np.full_like(estimates, np.nan)
        block[:, running] = estimates[:, running]
        gains = np.zeros_like(estimates)
        gains[:, running] = _gains_of_leaders(block[:, running], self._estimates[:, running].sum(0))
        self._estimates = np.concatenate([self._estimates, block])
        self._gains = np.concatenate([self._gains, gains])
        self.rounds += 1

        wealth = log_wealth(self._gains).max(axis=0)
        beaten = [j for j in running if wealth[j] >= -np.log(self._error)]
        if len(beaten) == len(running):
            beaten.remove(self.leader)
        self.eliminated |= dict.fromkeys(beaten, self.rounds)
        self.running = [j for j in running if j not in beaten]

    def values(self, candidate: int) -> Float[np.ndarray, " problems"]:
        """The estimates of a candidate on the problems it was measured on, in their order."""
        column = self._estimates[:, candidate]
        return column[~np.isnan(column)]

    @property
    def leader(self) -> int:
        """The candidate with the highest mean of those running; the first one of several."""
        return max(self.running, key=lambda j: self._estimates[:, j].sum())

    @property
    def decided(self) -> bool:
        """One is left, or the leader is good enough."""
        return len(self.running) == 1 or (self.tolerance > 0 and self._leader_is_good_enough())

    def _leader_is_good_enough(self) -> bool:
        others = [j for j in self.running if j != self.leader]
        gains = self._estimates[:, [self.leader]] - self._estimates[:, others] + self.tolerance
        candidates = self._estimates.shape[1]
        return bool(log_wealth(gains).max(axis=0, initial=0).min() >= np.log((candidates - 1) / self._error))


def mean_interval(values: Float[np.ndarray, " problems"], level: float) -> tuple[float, float, float]:
    """(low, high, level) for the mean of values in [0, 1], right with this probability at whatever time one stopped to look.

    It holds every m that neither the bets on `x_t - m` nor those on `m - x_t` refute: their wealth is below 2 / (1 - level).

    >>> low, high, _ = mean_interval(np.array([1.0, 1.0, 0.0, 1.0] * 10), 0.95)
    >>> round(low, 2), round(high, 2)
    (0.52, 0.95)
    """
    return _refuted_below(values, level), 1 - _refuted_below(1 - values, level), level


def log_wealth(gains: Float[np.ndarray, "problems *batch"]) -> Float[np.ndarray, "problems *batch"]:
    """After each problem, the log of the average over `BETS` of `Π_t (1 + λ gain_t)`; gains are at least -1."""
    wealth = np.cumsum(np.log1p(BETS * gains[..., None]), axis=0)
    return np.logaddexp.reduce(wealth, axis=-1) - np.log(len(BETS))


def _gains_of_leaders(
    estimates: Float[np.ndarray, "problems running"], totals: Float[np.ndarray, " running"]
) -> Float[np.ndarray, "problems running"]:
    """For each candidate, how much better the leader among the others does; several leaders count with their mean."""
    gains = np.empty_like(estimates)
    for t, x in enumerate(estimates):
        others = np.where(np.eye(len(x), dtype=bool), -np.inf, totals)
        leading = others == others.max(axis=1, keepdims=True)
        gains[t] = leading @ x / leading.sum(axis=1) - x
        totals = totals + x
    return gains


def _refuted_below(values: Float[np.ndarray, " problems"], level: float) -> float:
    """The smallest mean not refuted by bets that the values lie above it, by bisection: the wealth falls as the mean rises."""
    low, high = 0.0, 1.0
    for _ in range(40):
        mean = (low + high) / 2
        refuted = log_wealth(values - mean)[-1] >= np.log(2 / (1 - level))
        low, high = (mean, high) if refuted else (low, mean)
    return low
