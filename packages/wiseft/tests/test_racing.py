"""A race keeps the best candidate as often as it says, however the estimates are distributed."""

import numpy as np
import pytest

from wiseft.passk import pass_at_k
from wiseft.racing import Race, log_wealth, mean_interval


def run(race: Race, estimates: np.ndarray, block: int = 8) -> Race:
    for start in range(0, len(estimates), block):
        if race.decided:
            break
        race.update(estimates[start : start + block])
    return race


def simulated(rng: np.random.Generator, shifts: list[float], problems: int, n: int = 16, k: int = 8) -> np.ndarray:
    """Pass@k estimates of candidates on problems of very different difficulty; a candidate's log-odds are shifted by so much."""
    difficulty = rng.normal(-2, 2, (problems, 1))
    own = rng.normal(0, 0.5, (problems, len(shifts)))
    return pass_at_k(n, rng.binomial(n, 1 / (1 + np.exp(-(difficulty + own + shifts)))), k)


def test_among_equals_each_stays_as_often_as_stated():
    rng = np.random.default_rng(0)
    races = [run(Race(6), simulated(rng, [0] * 6, problems=96)) for _ in range(200)]
    eliminated = sum(len(race.eliminated) for race in races) / (6 * len(races))
    assert eliminated <= 0.05


@pytest.mark.parametrize("rare", [0.01, 0.03, 0.1])
def test_a_candidate_that_rarely_gains_much_is_not_eliminated_for_often_losing_little(rare):
    # Both have the same mean. A t test on the differences calls the second better in most such races: they all look alike.
    rng = np.random.default_rng(1)
    eliminated = 0
    for _ in range(200):
        gains_rarely = (rng.random(96) < rare).astype(float)
        race = run(Race(2), np.stack([gains_rarely, np.full(96, rare)], axis=1))
        eliminated += 0 in race.eliminated
    assert eliminated / 200 <= 0.05


def test_the_best_is_found_with_a_fraction_of_the_samples_where_gaps_are_large():
    rng = np.random.default_rng(2)
    races = [run(Race(6), simulated(rng, [0, -2, -2, -3, -3, -4], problems=400)) for _ in range(40)]
    assert sum(race.running == [0] for race in races) >= 0.95 * 40
    assert np.mean([sum(len(race.values(j)) for j in range(6)) / (6 * 400) for race in races]) < 0.25


def test_a_tolerance_ends_a_race_between_equals_and_is_rarely_wrong():
    rng = np.random.default_rng(3)
    races = [run(Race(3, tolerance=0.1), simulated(rng, [0, 0, 0], problems=400)) for _ in range(40)]
    assert sum(race.decided for race in races) >= 0.9 * 40
    assert np.mean([len(race.values(race.leader)) for race in races]) < 300
    # The first is better by almost twice the tolerance: who is chosen must not be another one.
    estimates = [simulated(rng, [0, -1.1], problems=200) for _ in range(100)]
    assert 0.1 < np.mean(np.concatenate([x[:, 0] - x[:, 1] for x in estimates])) < 0.2
    assert sum(run(Race(2, tolerance=0.1), x).leader != 0 for x in estimates) <= 5


def test_a_race_ends_within_tolerance_as_soon_as_the_bets_say_so():
    race = run(Race(3, tolerance=0.1), np.tile([0.5, 0.45, 0.45], (100, 1)), block=1)
    stakes = (np.arange(10) + 0.5) / 10
    needed = next(t for t in range(100) if np.mean((1 + stakes * (0.05 + 0.1)) ** t) >= 2 / 0.025)
    assert (race.rounds, race.running) == (needed, [0, 1, 2])


def test_of_two_that_look_beaten_in_one_round_the_leader_stays():
    race = Race(2)
    race.update(np.concatenate([np.tile([1.0, 0.0], (20, 1)), np.tile([0.0, 1.0], (60, 1))]))
    assert (race.running, race.eliminated) == ([1], {0: 1})


def test_a_race_ends_with_one_left_and_does_not_read_those_that_left():
    race = run(Race(3), np.tile([0.2, 0.9, 0.1], (40, 1)))
    assert race.running == [1]
    assert race.decided
    race = Race(3)
    race.update(np.tile([0.9, 0.9, 0.1], (16, 1)))
    assert race.running == [0, 1]
    race.update(np.tile([0.9, 0.9, np.nan], (16, 1)))
    assert [len(race.values(j)) for j in range(3)] == [32, 32, 16]
    assert race.leader == 0


def test_an_interval_is_right_at_every_look():
    # An end of the interval passes the mean m when the bets on x - m, or on m - x, reach 2 / (1 - level).
    values = (np.random.default_rng(4).random((200, 2000)) < 0.3).astype(float)
    for side in (1, -1):
        assert np.mean(log_wealth(side * (values - 0.3)).max(axis=0) >= np.log(2 / 0.05)) <= 0.025
    low, high, _ = mean_interval(values[:, 0], 0.95)
    assert low < values[:, 0].mean() < high
    for end, side in ((low, 1), (high, -1)):
        assert log_wealth(side * (values[:, 0] - end))[-1] == pytest.approx(np.log(2 / 0.05))
