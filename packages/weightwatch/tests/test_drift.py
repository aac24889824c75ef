import numpy as np
import pytest

from lmcore.errors import UserError
from weightwatch.calibration import Calibration
from weightwatch.drift import Drift


def test_false_alarms_of_exchangeable_streams_stay_below_the_level_and_near_it():
    generator, level, streams = np.random.default_rng(0), 0.05, 600
    alarms = 0
    for _ in range(streams):  # a calibration each: the level is marginal over it
        drift = Drift(generator.standard_t(3, 60), block=40, level=level)
        alarms += len(drift.add(generator.standard_t(3, 40)))
    rate, error = alarms / streams, (level * (1 - level) / streams) ** 0.5
    assert rate <= level + 3 * error
    assert rate >= 0.4 * level  # the statistic is discrete, so the test is a little conservative


def test_a_shifted_stream_is_noticed_within_a_block_or_two():
    generator = np.random.default_rng(0)
    drift = Drift(generator.normal(size=256))
    assert drift.add(generator.normal(size=500)) == []
    alarms = drift.add(generator.normal(1.0, size=300))
    assert [alarm.block for alarm in alarms] == [5, 6, 7]
    assert all(alarm.p_value <= drift.level and alarm.statistic > 0.2 for alarm in alarms)


def test_a_wider_distribution_with_the_same_mean_is_noticed():
    generator = np.random.default_rng(0)
    drift = Drift(generator.normal(size=256))
    assert drift.add(generator.normal(0.0, 4.0, size=200))


def test_the_alarms_do_not_depend_on_how_the_stream_is_cut_or_on_a_restart(tmp_path):
    generator = np.random.default_rng(0)
    calibration, stream = generator.normal(size=64), generator.normal(0.8, size=333)
    at_once = Drift(calibration, block=30, level=0.01).add(stream)
    drift, alarms = Drift(calibration, block=30, level=0.01), []
    for part in np.array_split(stream, 17):
        alarms += drift.add(part)
        drift.save(tmp_path / "drift")
        drift = Drift.load(tmp_path / "drift")
    assert alarms == at_once
    assert at_once


def test_inputs_of_another_kind_are_noticed_by_the_scores_of_a_calibration():
    generator = np.random.default_rng(0)

    def inputs(count, width):
        cosines = generator.normal(0, width, (2, count, 2, 5)).astype(np.float32).clip(-1, 1)
        return cosines.min(0), cosines.max(0)

    calibration = Calibration("digest", 5)
    calibration.add([str(i) for i in range(600)], *inputs(600, 0.1))
    scores = calibration.scores()
    drift = Drift(scores.sample)
    assert len(drift.calibration) == 256
    assert drift.add(scores.of(*inputs(500, 0.1))) == []
    assert len(drift.add(scores.of(*inputs(500, 0.13)))) >= 4


def test_infinite_scores_count_as_far_out():
    drift = Drift(np.arange(100.0), block=20, level=0.01)
    assert len(drift.add(np.full(20, np.inf))) == 1


def test_the_state_is_small(tmp_path):
    drift = Drift(np.zeros(256))
    drift.add(np.zeros(99))
    drift.save(tmp_path / "drift")
    assert (tmp_path / "drift").stat().st_size < 4096


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"never reach level 0.001: take larger blocks"):
        Drift(np.zeros(5), block=3)
    with pytest.raises(UserError, match="needs calibration scores"):
        Drift(np.zeros(0))
    with pytest.raises(UserError, match="NaN"):
        Drift(np.zeros(256)).add(np.array([np.nan]))
