"""A verdict follows from the numbers."""

import pytest

from lmcore.claims import Quantity, as_text, judge, not_tested, rows, seed_interval, to_json


def verdict(effects, **options):
    return judge(id="c", statement="C.", effects=effects, unit="points", seeds=list(range(len(effects))), **options).verdict


def test_verdicts():
    assert verdict([1.0, 1.1, 0.9]) == "reproduced"
    assert verdict([1.0, 1.1, 0.9], at_least=2.0) == "direction only"
    assert verdict([1.0, 3.0, -0.5]) == "direction only"
    assert verdict([5.0]) == "direction only", "one seed has no interval"
    assert verdict([-1.0, -1.1, 0.5]) == "not reproduced"
    assert verdict([0.0, 0.0]) == "not reproduced"


def test_what_cannot_be_judged_is_refused():
    for effects, seeds in [([], []), ([1.0], [0, 1]), ([float("nan")], [0])]:
        with pytest.raises(ValueError, match="claim c"):
            judge(id="c", statement="C.", effects=effects, unit="points", seeds=seeds)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.3027), (5, 2.7764), (10, 2.2622), (31, 2.0423)])
def test_interval_is_students(count, quantile):
    values = [float(value) for value in range(count)]
    low, high, level = seed_interval(values)
    mean = sum(values) / count
    deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    assert (high - low) / 2 == pytest.approx(quantile * deviation / count**0.5, rel=1e-4)
    assert (low + high) / 2 == pytest.approx(mean)
    assert level == 0.95


def test_table_shows_numbers_seeds_and_what_was_not_tested():
    tested = judge(id="a", statement="A.", effects=[1.0, 2.0], unit="points", seeds=[3, 4], published=Quantity(7.0, "points"))
    result = to_json("example", [tested, not_tested(id="b", statement="B.", why="needs a GPU")], scale="long")
    assert result["seeds"] == [3, 4]
    table = rows(result)
    assert table[0]["measured"].startswith("+1.5 points [")
    assert table[0]["published"] == "7 points"
    assert table[1] == {"claim": "B.", "published": "-", "measured": "-", "verdict": "not tested", "seeds": "0"}
    assert "not tested" in as_text(result)
    assert result["claims"][1]["rule"] == "needs a GPU"
