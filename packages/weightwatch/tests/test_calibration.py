import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.errors import UserError
from weightwatch.bounds import Bounds
from weightwatch.calibration import Calibration
from weightwatch.planning import fpr_bound


def extremes(inputs, directions, *, seed=0, roles=2, coarse=False):
    """Exchangeable extremes with heavy tails, a shared factor and a scale per direction; in coarse ones, ties and absent roles."""
    generator = np.random.default_rng(seed)
    shape = (inputs, roles, directions)
    values = 0.02 * generator.gamma(1, size=(2, *shape)) * (1 + np.arange(directions)) + 0.02 * generator.gamma(
        1, size=(inputs, 1, 1)
    )
    low, high = np.float32(-np.minimum(values[0], 1)), np.float32(np.minimum(values[1], 1))
    if coarse:
        low, high = np.round(low * 8) / 8, np.round(high * 8) / 8
        absent = generator.random((inputs, roles)) < 0.3
        low[absent], high[absent] = np.inf, -np.inf
    return low, high


def names(inputs, prefix="chat"):
    return [f"{prefix} {i}" for i in range(inputs)]


def calibrated(low, high, **sizes):
    calibration = Calibration("digest", low.shape[2], **sizes)
    calibration.add(names(len(low)), low, high)
    return calibration


def test_the_file_is_the_same_for_every_order_chunking_and_merging(tmp_path):
    low, high = extremes(60, 3, coarse=True)
    ids = names(60)
    calibrated(low, high, tail=4, sample=7).save(tmp_path / "at once")
    expected = (tmp_path / "at once").read_bytes()

    @given(st.permutations(range(60)), st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False))
    @settings(max_examples=60, deadline=None)
    def check(order, cuts, random):
        parts = []
        for chunk in np.split(np.array(order), sorted(cuts)):
            if not parts or random.random() < 0.5:
                parts.append(Calibration("digest", 3, tail=4, sample=7))
            random.choice(parts).add([ids[i] for i in chunk], low[chunk], high[chunk])
        random.shuffle(parts)
        while len(parts) > 1:  # merge as a tree or as a chain, whichever comes
            parts.insert(random.randrange(len(parts)), merged(parts.pop(), parts.pop()))
        parts[0].save(tmp_path / "parts")
        assert (tmp_path / "parts").read_bytes() == expected

    def merged(one, other):
        one.merge(other)
        return one

    check()


def test_min_max_is_the_range_of_all_inputs_and_epsilon():
    low, high = extremes(3000, 4)
    bounds = calibrated(low, high).bounds("minmax")
    np.testing.assert_array_equal(bounds.low, low.min(0) - np.float32(0.01))
    np.testing.assert_array_equal(bounds.high, high.max(0) + np.float32(0.01))


@pytest.mark.parametrize("percentile", [0.0, 0.001, 0.02, 0.0212])
def test_percentiles_are_the_order_statistics_of_each_side(percentile):
    low, high = extremes(3000, 4)
    bounds = calibrated(low, high).bounds("percentile", percentile)
    left_out = int(percentile * 3000)
    np.testing.assert_array_equal(bounds.low, np.sort(low, 0)[left_out])
    np.testing.assert_array_equal(bounds.high, np.sort(high, 0)[::-1][left_out])


def test_percentiles_of_a_role_are_of_the_inputs_that_have_it():
    low, high = extremes(100, 2)
    low[:50, 1], high[:50, 1] = np.inf, -np.inf
    bounds = calibrated(low, high).bounds("percentile", 0.04)
    np.testing.assert_array_equal(bounds.high[0], np.sort(high[:, 0], 0)[::-1][4])
    np.testing.assert_array_equal(bounds.high[1], np.sort(high[50:, 1], 0)[::-1][2])


def halves(calibration, low, high):
    """Which inputs are in the scaling half, found by calibrating on each alone."""
    alone = []
    for i, name in enumerate(names(len(low))):
        one = Calibration(calibration.directions, low.shape[2], tail=1, sample=0)
        one.add([name], low[i : i + 1], high[i : i + 1])
        alone.append(one.scored_inputs == 0)
    return np.array(alone)


def test_scores_are_margins_beyond_one_half_and_hold_the_largest_of_the_other():
    low, high = extremes(400, 3)
    scores = calibrated(low, high, tail=32).scores()
    scaling = halves(Calibration("digest", 3), low, high)
    outward = np.stack([-low, high], -1).astype(np.float64)
    np.testing.assert_array_equal(scores.furthest, outward[scaling].max(0))

    expected = (outward[~scaling] - scores.furthest).max((1, 2, 3))
    assert 150 < scores.inputs == (~scaling).sum() < 250
    np.testing.assert_array_equal(scores.largest, np.sort(expected[expected >= scores.exact_above])[::-1])
    assert len(scores.largest) > 20
    np.testing.assert_array_equal(scores.of(low, high)[~scaling], expected)
    np.testing.assert_array_equal(np.sort(scores.sample), np.sort(expected))  # all, as they are fewer than the sample


def test_with_a_full_tail_every_score_is_exact_and_p_values_count_them():
    low, high = extremes(100, 3)
    scores = calibrated(low, high, tail=100).scores()
    new = scores.of(*extremes(50, 3, seed=1))
    expected = [(1 + (scores.largest >= score).sum()) / (scores.inputs + 1) for score in new]
    assert len(scores.largest) == scores.inputs
    np.testing.assert_array_equal(scores.p_values(new), expected)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_conformal_bounds_flag_where_the_p_value_is_at_most_alpha(alpha):
    calibration = calibrated(*extremes(800, 3), tail=200)
    bounds, scores = calibration.bounds("conformal", alpha), calibration.scores()
    low, high = extremes(2000, 3, seed=1)
    flags = bounds.flags(low, high)
    np.testing.assert_array_equal(flags, scores.p_values(scores.of(low, high)) <= alpha)
    assert 0 < flags.sum() < 2000


def test_a_score_that_many_inputs_share_has_no_small_p_value_though_the_tail_holds_few_of_them():
    low, high = np.full((2000, 2, 1), -0.1, np.float32), np.full((2000, 2, 1), 0.25, np.float32)  # the tokens of one template
    scores = calibrated(low, high, tail=8).scores()
    assert len(scores.largest) < 20
    assert (scores.p_values(scores.of(low, high)) == 1).all()
    assert scores.p_values(np.array([0.01])) == 1 / (scores.inputs + 1)


def test_of_the_scored_half_all_but_the_k_minus_1_furthest_lie_within_conformal_bounds():
    low, high = extremes(500, 4)
    calibration = calibrated(low, high)
    bounds = calibration.bounds("conformal", 0.05)
    scored = ~halves(calibration, low, high)
    assert bounds.flags(low[scored], high[scored]).sum() == bounds.rule["rank"] - 1


def test_the_rate_of_false_alarms_of_conformal_bounds_is_alpha_on_average_over_calibrations():
    alpha, calibrations, inputs = 0.1, 400, 60
    low, high = extremes(calibrations * 2 * inputs, 5)
    excess, rates = [], []
    for start in range(0, len(low), 2 * inputs):
        old, new = slice(start, start + inputs), slice(start + inputs, start + 2 * inputs)
        bounds = calibrated(low[old], high[old]).bounds("conformal", alpha)
        rates.append(bounds.flags(low[new], high[new]).mean())
        excess.append(rates[-1] - bounds.rule["fpr_bound"])  # k / (n + 1), what continuous scores attain exactly
    error = np.std(excess) / calibrations**0.5
    assert abs(np.mean(excess)) < 4 * error < 0.015
    assert 0.07 < np.mean(rates) < alpha + 4 * error


@pytest.mark.parametrize(("rule", "level"), [("minmax", 0.0), ("percentile", 0.02)])
def test_the_rates_of_min_max_and_percentiles_stay_below_their_bounds(rule, level):
    calibrations, inputs = 150, 120
    low, high = extremes(calibrations * 2 * inputs, 2)
    rates = []
    for start in range(0, len(low), 2 * inputs):
        old, new = slice(start, start + inputs), slice(start + inputs, start + 2 * inputs)
        bounds = calibrated(low[old], high[old]).bounds(rule, level)
        rates.append(bounds.flags(low[new], high[new]).mean())
    left_out = int(level * inputs)
    assert bounds.rule["fpr_bound"] == pytest.approx(2 * 2 * 2 * (left_out + 1) / (inputs + 1))
    error = np.std(rates) / calibrations**0.5
    assert 0.4 * bounds.rule["fpr_bound"] < np.mean(rates) < bounds.rule["fpr_bound"] + 4 * error


def test_the_bound_of_min_max_is_the_papers_per_role():
    low, high = extremes(1000, 3)
    assert calibrated(low, high).bounds("minmax").rule["fpr_bound"] == pytest.approx(2 * fpr_bound(3, 1000))
    low[:, 1], high[:, 1] = np.inf, -np.inf
    assert calibrated(low, high).bounds("minmax").rule["fpr_bound"] == fpr_bound(3, 1000)


@pytest.mark.parametrize(("rule", "level"), [("minmax", 0.5), ("percentile", 0.01), ("conformal", 0.02)])
def test_an_input_with_a_role_that_calibration_never_saw_is_flagged(rule, level):
    low, high = extremes(200, 3)
    prompts = low.copy(), high.copy()
    prompts[0][:, 1], prompts[1][:, 1] = np.inf, -np.inf
    bounds = calibrated(*prompts).bounds(rule, level)
    assert bounds.flags(*prompts).mean() < 0.2
    assert bounds.flags(np.zeros_like(low), np.zeros_like(high)).all()


def test_scores_of_unseen_roles_are_infinite():
    low, high = extremes(200, 3)
    low[:, 1], high[:, 1] = np.inf, -np.inf
    scores = calibrated(low, high).scores()
    assert np.isfinite(scores.of(low, high)).all()
    assert (scores.of(*extremes(5, 3)) == np.inf).all()


def test_a_direction_that_never_varied_is_left_by_a_margin_as_any_other():
    low, high = extremes(300, 3)
    low[..., 0], high[..., 0] = 0.25, 0.25
    calibration = calibrated(low, high)
    bounds, margin = calibration.bounds("conformal", 0.05), calibration.scores().largest[5]  # k = 6 of 137
    assert bounds.rule["rank"] == 6
    assert bounds.flags(low, high).mean() < 0.15
    for further, flagged in ((0.5, False), (1.5, True)):
        high[:, 0, 0] = 0.25 + further * margin
        assert bounds.flags(low, high).mean() > 0.99 if flagged else bounds.flags(low, high).mean() < 0.15


def test_conformal_ranges_are_those_of_the_scaling_half_widened_by_one_margin():
    calibration = calibrated(*extremes(400, 3))
    bounds, scores = calibration.bounds("conformal", 0.05), calibration.scores()
    margin = scores.largest[bounds.rule["rank"] - 1]
    np.testing.assert_allclose(np.stack([-bounds.low, bounds.high], -1), scores.furthest + margin, atol=1e-7)


def test_exceeded_names_role_direction_side_value_bound_and_margin():
    bounds = calibrated(*extremes(100, 3)).bounds("minmax")
    low, high = (one[:4].copy() for one in extremes(100, 3))
    low[1, 0, 2] = bounds.low[0, 2] - 0.25
    high[1, 1, 1] = bounds.high[1, 1] + 0.5
    high[3, 0, 0] = bounds.high[0, 0] + np.float32(1e-3)
    found = bounds.exceeded(low, high)
    assert found[["input", "role", "direction", "side"]].tolist() == [(1, 1, 1, 1), (1, 0, 2, 0), (3, 0, 0, 1)]
    np.testing.assert_allclose(found["margin"], [0.5, 0.25, 1e-3], rtol=1e-3)
    np.testing.assert_array_equal(found["value"], [high[1, 1, 1], low[1, 0, 2], high[3, 0, 0]])
    np.testing.assert_array_equal(found["bound"], [bounds.high[1, 1], bounds.low[0, 2], bounds.high[0, 0]])
    assert len(bounds.exceeded(low[:1], high[:1])) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_streaming_flags_first_and_then_widens(epsilon):
    low, high = extremes(300, 2, coarse=True)
    start = calibrated(low[:20], high[:20]).bounds("minmax", epsilon)
    expected, least, greatest = [], low[:20].min(0), high[:20].max(0)
    for one_low, one_high in zip(low[20:], high[20:], strict=True):  # the paper's rule, as it is written
        below, above = np.float32(one_low) < least - np.float32(epsilon), one_high > greatest + np.float32(epsilon)
        expected.append(bool((below | above).any()))
        least, greatest = np.minimum(least, one_low), np.maximum(greatest, one_high)
    bounds, flags = start, []
    for part in np.array_split(np.arange(20, 300), 7):
        bounds, found = bounds.update(low[part], high[part])
        flags += found.tolist()
    assert flags == expected
    assert 0 < sum(flags) < 280
    np.testing.assert_array_equal(bounds.low, calibrated(low, high).bounds("minmax", epsilon).low)


def test_an_anomaly_is_flagged_at_first_sight_and_widening_never_adds_flags():
    low, high = extremes(400, 3)
    bounds = calibrated(low, high).bounds("conformal", 0.1)
    new = extremes(200, 3, seed=5)
    frozen = bounds.flags(*new)
    _, streamed = bounds.update(*new)
    assert frozen.any()
    assert (streamed <= frozen).all()
    assert streamed[frozen.argmax()]
    once, twice = (np.concatenate([one[:1], one[:1]]) for one in (new[0] - 2, new[1]))
    assert bounds.update(once, twice)[1].tolist() == [True, False]


def test_bounds_survive_their_file(tmp_path):
    bounds = calibrated(*extremes(200, 3)).bounds("conformal", 0.05)
    bounds.save(tmp_path / "bounds")
    loaded = Bounds.load(tmp_path / "bounds", directions="digest")
    np.testing.assert_array_equal(loaded.low, bounds.low)
    np.testing.assert_array_equal(loaded.high, bounds.high)
    assert loaded.rule == bounds.rule
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bounds").read_bytes()


def test_a_calibration_survives_its_file_and_goes_on(tmp_path):
    low, high = extremes(200, 3)
    first = Calibration("digest", 3, tail=5, sample=20)
    first.add(names(120), low[:120], high[:120])
    first.save(tmp_path / "state")
    second = Calibration.load(tmp_path / "state", directions="digest")
    done = second.resume(names(200))
    assert done == 120
    second.add(names(200)[done:], low[done:], high[done:])
    second.save(tmp_path / "state")
    calibrated(low, high, tail=5, sample=20).save(tmp_path / "at once")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "at once").read_bytes()


def test_resuming_with_another_file_is_refused():
    calibration = calibrated(*extremes(10, 2))
    for other in (names(10, "other"), names(9), ["chat 1", "chat 1", *names(8)]):
        with pytest.raises(UserError, match="holds 10 inputs that are not the first 10 of these"):
            calibration.resume(other)


CALIBRATE = """
import sys
import numpy as np
from pathlib import Path
from weightwatch.calibration import Calibration
path, ids = Path(sys.argv[1]), [f"chat {i}" for i in range(400)]
calibration = Calibration.load(path, directions="digest") if path.exists() else Calibration("digest", 3)
values = np.random.default_rng(0).normal(0, 0.1, (2, 400, 2, 3)).astype(np.float32)
for start in range(calibration.resume(ids), 400, 4):
    part = slice(start, start + 4)
    calibration.add(ids[part], values.min(0)[part], values.max(0)[part])
    calibration.save(path)
"""


def test_a_calibration_that_was_killed_at_any_moment_ends_in_the_same_file(tmp_path):
    def calibrate(name, seconds=None):
        process = subprocess.Popen(
            [sys.executable, "-c", CALIBRATE, str(tmp_path / name)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if seconds is not None:
            deadline = time.monotonic() + 60
            while not (tmp_path / name).exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        return process.wait()

    assert calibrate("at once") == 0
    kills = [calibrate("killed", seconds) for seconds in (0.0, 0.03, 0.1)]
    assert -signal.SIGKILL in kills
    assert calibrate("killed") == 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "at once").read_bytes()


def test_the_file_has_the_size_that_is_stated_and_does_not_grow_with_inputs(tmp_path):
    directions, sizes = 135, []
    for inputs in (600, 1200):
        calibrated(*extremes(inputs, directions), tail=64, sample=256).save(tmp_path / "state")
        sizes.append((tmp_path / "state").stat().st_size)
    stated = 48 * directions * 64 + 16 * directions * 256 + 16 * directions
    assert stated < sizes[0] < stated + 4096
    assert abs(sizes[1] - sizes[0]) < 64
    assert 8 * stated == 7_758_720  # the 7.8 MB of t = 1080


def test_five_thousand_inputs_are_checked_against_a_thousand_directions_in_no_time():
    low, high = (np.full((5000, 1, 1160), value, np.float32) for value in (-0.1, 0.1))
    bounds = Bounds(np.full((1, 1160), -0.2, np.float32), np.full((1, 1160), 0.2, np.float32), "digest")
    high[4321, 0, 1000] = 0.3
    start = time.perf_counter()
    flags = bounds.flags(low, high)
    assert time.perf_counter() - start < 1.0
    assert np.flatnonzero(flags).tolist() == [4321]


def test_too_little_calibration_says_how_much_is_needed():
    empty = Calibration("digest", 3)
    for rule in ("minmax", "percentile", "conformal"):
        with pytest.raises(UserError, match=r"empty: calibrate on at least one input|holds 0 inputs: too few"):
            empty.bounds(rule)
    calibration = calibrated(*extremes(100, 3), tail=8)
    with pytest.raises(
        UserError, match=r"alpha 0.001 needs 999 scored inputs, .* calibrate on about 2000 inputs or more, or raise alpha"
    ):
        calibration.bounds("conformal", 0.001)
    with pytest.raises(UserError, match="a tail of 8: calibrate anew with a tail of 11, or lower the percentile"):
        calibration.bounds("percentile", 0.1)
    with pytest.raises(UserError, match=r"largest scores .* calibrate anew with a tail of"):
        calibration.bounds("conformal", 0.9)


def test_a_tail_of_the_size_that_the_error_names_is_enough():
    low, high = extremes(400, 3)
    with pytest.raises(UserError) as error:
        calibrated(low, high, tail=4).bounds("conformal", 0.2)
    tail = int(str(error.value).partition("a tail of ")[2].partition("with a tail of ")[2].partition(",")[0])
    bounds = calibrated(low, high, tail=tail).bounds("conformal", 0.2)
    np.testing.assert_array_equal(bounds.low, calibrated(low, high, tail=400).bounds("conformal", 0.2).low)


def test_extremes_that_no_input_has_are_refused_and_change_nothing(tmp_path):
    low, high = extremes(20, 3)
    calibration = calibrated(low, high)
    calibration.save(tmp_path / "before")
    new = names(20, "new")
    for fault, value, message in (
        ("low", np.nan, "input 7 of 20 has a cosine that is NaN"),
        ("high", 1.5, "input 'new 7' has extremes that are no cosines"),
        ("low", 0.99, "input 'new 7' has extremes that are no cosines"),
        ("high", -np.inf, "input 'new 7' has extremes that are no cosines"),
    ):
        broken = {"low": low.copy(), "high": high.copy()}
        broken[fault][7, 1, 2] = value
        with pytest.raises(UserError, match=message):
            calibration.add(new, **broken)
    with pytest.raises(UserError, match="input 'twice' is there twice"):
        calibration.add(["twice", "twice"], low[:2], high[:2])
    with pytest.raises(UserError, match="at least 20 of the inputs are in the calibration already"):
        calibration.add(names(20), low, high)
    with pytest.raises(UserError, match=r"shapes \(20, 2, 2\)"):
        calibration.add(new, low[..., :2], high[..., :2])
    with pytest.raises(UserError, match="at least 20 of the inputs are in both calibrations"):
        calibration.merge(calibrated(low, high))
    calibration.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_other_directions_and_other_sizes_are_refused(tmp_path):
    calibration = calibrated(*extremes(20, 3))
    calibration.save(tmp_path / "state")
    calibration.bounds("minmax").save(tmp_path / "bounds")
    for load in (Calibration.load, Bounds.load):
        path = tmp_path / ("state" if load == Calibration.load else "bounds")
        with pytest.raises(UserError, match=r"belongs to directions digest, not other: use the directions it was made with"):
            load(path, directions="other")
    with pytest.raises(UserError, match="of directions digest and other cannot be merged"):
        calibration.merge(Calibration("other", 3))
    with pytest.raises(UserError, match="another tail or sample"):
        calibration.merge(Calibration("digest", 3, tail=5))


def test_damaged_foreign_and_missing_files_are_named(tmp_path):
    calibrated(*extremes(20, 3)).save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    flipped = [bytes(byte ^ (i == at) for i, byte in enumerate(whole)) for at in (len(whole) // 2, len(whole) - 1)]
    for damaged in (b"", whole[:100], whole[:-1], b"[]" * 50, *flipped):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged is damaged or not a file of weightwatch"):
            Calibration.load(tmp_path / "damaged", directions="digest")
    with pytest.raises(UserError, match="holds a calibration, not bounds"):
        Bounds.load(tmp_path / "state", directions="digest")
    with pytest.raises(UserError, match="No such file"):
        Bounds.load(tmp_path / "missing", directions="digest")


def test_rules_refuse_levels_that_mean_nothing():
    calibration = calibrated(*extremes(20, 3))
    for rule, level in (("minmax", -0.1), ("percentile", 1.0), ("percentile", -0.1), ("conformal", 0.0), ("conformal", 1.0)):
        with pytest.raises(UserError, match=r"is -0.1|is 1.0|is 0.0"):
            calibration.bounds(rule, level)


def test_bounds_of_nothing_are_nothing():
    bounds = calibrated(*extremes(20, 3)).bounds("minmax")
    nothing = np.zeros((0, 2, 3), np.float32)
    assert bounds.flags(nothing, nothing).shape == (0,)
    assert len(bounds.exceeded(nothing, nothing)) == 0
    assert replace(bounds).update(nothing, nothing)[1].shape == (0,)
