"""Planted effects are recovered with intervals that cover them; what is not there is not found; thin evidence is marked."""

from itertools import pairwise

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.bootstrap import family_draws
from scaling_meta.effects import default_edges, local_effects, shap_effects, within
from scaling_meta.questions import Question, answer
from scaling_meta.shap import explain, fit
from scaling_meta.splits import random_folds
from scaling_meta.table import Table

FAMILIES, SIBLINGS = 45, 4
CODE_ENDS = (0.0, 10.0, 15.0, 25.0, 40.0, 60.0)


def planted(code: np.ndarray) -> np.ndarray:
    """The score has an optimum of 20 % of code."""
    return -0.005 * np.abs(code - 20)


def world(seed: int) -> tuple[Table, np.ndarray]:
    """Siblings share a block type and an effect of their own; the number of heads does nothing."""
    random, count = np.random.default_rng(seed), FAMILIES * SIBLINGS
    family = np.repeat(np.arange(FAMILIES), SIBLINGS)
    size, code = random.normal(22, 2, count), random.uniform(0, 60, count)
    values = np.column_stack([size, code, random.uniform(8, 64, count), (family % 2).astype(float)])
    features, categories = ("log_params", "share_code", "num_heads", "block_type"), {"block_type": ("parallel", "sequential")}
    names = tuple(f"m{row}" for row in range(count))
    table = Table(names, features, values, categories, tuple(f"f{number}" for number in family), ("",) * count)
    effect = np.repeat(random.normal(0, 0.05, FAMILIES), SIBLINGS)
    return table, 0.03 * size + planted(code) + effect + random.normal(0, 0.005, count)


@pytest.fixture(scope="module")
def table() -> Table:
    return world(0)[0]


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return world(0)[1]


@pytest.fixture(scope="module")
def draws(table) -> np.ndarray:
    return family_draws(table.families, 100)


@pytest.fixture(scope="module")
def attribution(table, y, draws):
    return explain(table, y, draws, splits=random_folds(len(table)))


@pytest.fixture(scope="module")
def forests(table, y, draws):
    return fit(table, y, draws)


def test_curves_peak_at_the_planted_optimum_and_their_intervals_cover_it():
    covered = {"shap": [], "local": []}
    for seed in range(4):
        table, y = world(seed)
        draws, code = family_draws(table.families, 60), table.column("share_code")
        truth = planted(code) - planted(code).mean()
        inside = [(code >= low) & (code < high) for low, high in pairwise(CODE_ENDS)]
        curves = {
            "shap": shap_effects(explain(table, y, draws, splits=random_folds(len(table))), "share_code").curve(CODE_ENDS),
            "local": local_effects(table, fit(table, y, draws), draws, "share_code").curve(CODE_ENDS),
        }
        for name, curve in curves.items():
            assert curve[int(np.argmax([one.effect.value for one in curve]))].name == "15 to 25"
            assert [one.models for one in curve] == [some.sum() for some in inside]
            ends = [one.effect.interval[:2] for one in curve]
            covered[name] += [low <= truth[some].mean() <= high for (low, high), some in zip(ends, inside, strict=True)]
    assert np.mean(covered["local"]) >= 0.85
    assert np.mean(covered["shap"]) >= 0.6  # trees round off the peak


def test_intervals_of_a_feature_that_does_nothing_cover_zero(table, attribution, forests, draws):
    middle = float(np.median(table.column("num_heads")))
    for effects in (shap_effects(attribution, "num_heads"), local_effects(table, forests, draws, "num_heads")):
        low, high, _ = effects.contrast((8.0, middle), (middle, 64.0)).difference.interval
        assert low < 0 < high
        assert all(one.effect.interval[0] <= 0 <= one.effect.interval[1] for one in effects.curve())


def test_a_feature_of_whole_families_looks_certain_only_if_siblings_count_as_independent(table, draws):
    random = np.random.default_rng(11)
    y = np.repeat(random.normal(0, 0.1, FAMILIES), SIBLINGS) + random.normal(0, 0.001, len(table))
    alone = family_draws(table.models, 100)
    widths = []
    for some in (draws, alone):
        difference = (
            shap_effects(explain(table.select(["block_type"]), y, some), "block_type")
            .contrast("parallel", "sequential")
            .difference
        )
        widths.append(difference.interval[1] - difference.interval[0])
    assert widths[0] > 1.5 * widths[1]  # the standard errors differ by a factor of 2, the root of 4 siblings


def test_local_effects_are_those_of_the_feature_alone_even_where_features_go_together():
    random, count = np.random.default_rng(2), 300
    size = random.uniform(20, 25, count)
    values, families = (
        np.column_stack([size, 10 * (size - 20) + random.normal(0, 2, count)]),
        tuple(f"f{row % 50}" for row in range(count)),
    )
    table = Table(tuple(map(str, range(count))), ("log_params", "share_web"), values, {}, families, ("",) * count)
    once = np.ones((1, count), np.uint8)
    forests = fit(table, 0.1 * size, once)
    curve = local_effects(table, forests, once, "log_params").curve((20.0, 21.0, 22.0, 23.0, 24.0, 25.0))
    np.testing.assert_allclose(np.diff([one.effect.value for one in curve]), 0.1, atol=0.01)
    flat = local_effects(table, forests, once, "share_web").curve((0.0, 10.0, 20.0, 30.0, 40.0, 50.0))
    assert np.abs([one.effect.value for one in flat]).max() < 0.02


def test_thin_ranges_are_marked_and_named():
    values = np.array([[1.0], [2.0], [3.0], [12.0], [13.0], [14.0], [17.0], [30.0], [np.nan]])
    families = ("A", "B", "C", "A", "A", "B", "B", "D", "E")
    table = Table(tuple("abcdefghi"), ("share_code",), values, {}, families, ("",) * 9)
    draws = family_draws(families, 20)
    ends = (0.0, 5.0, 15.0, 20.0, 25.0, 30.0)
    curve = shap_effects(explain(table, np.arange(9.0), draws), "share_code").curve(ends)
    assert [one.name for one in curve] == ["0 to 5", "5 to 15", "15 to 20", "20 to 25", "25 to 30"]
    assert [one.models for one in curve] == [3, 3, 1, 0, 1]
    assert [one.support for one in curve] == ["weak", "weak", "weak", "none", "weak"]
    assert curve[1].families == ("A", "B")
    assert np.isnan(curve[3].effect.value)
    local = local_effects(table, fit(table, np.arange(9.0), draws), draws, "share_code").curve(ends)
    assert [(one.name, one.models, one.support) for one in local] == [(one.name, one.models, one.support) for one in curve]
    assert np.isnan(local[3].effect.value)


def test_a_range_that_a_draw_has_no_model_of_is_that_of_unseen_models(table, y):
    draws = np.ones((2, len(table)), np.uint8)
    inside = within(table, "share_code", (15.0, 25.0))
    draws[1, inside] = 0
    found = explain(table, y, draws)
    (effect,) = shap_effects(found, "share_code").curve((15.0, 25.0))
    assert effect.effect.interval[0] == pytest.approx(found.values[1, inside, 1].mean())


def test_default_ranges_hold_about_as_many_models_each(table):
    ends = default_edges(table, "num_heads")
    counts = [int(within(table, "num_heads", one).sum()) for one in pairwise(ends)]
    assert sum(counts) == len(table)
    assert max(counts) - min(counts) <= 2
    assert default_edges(table, "share_code")[-1] == 100


def test_answers_weigh_the_interval_and_the_families(attribution):
    def ask(below, above, expected):
        question = Question(name="q", text="?", feature="share_code", below=below, above=above, expected={"lambada": expected})
        return answer("lambada", shap_effects(attribution, "share_code"), question).verdict

    assert ask((15.0, 25.0), (25.0, 100.0), -1) == "as expected"
    assert ask((15.0, 25.0), (25.0, 100.0), 1) == "opposite"
    second = float(np.sort(attribution.table.column("share_code"))[1])
    assert ask((0.0, second), (25.0, 100.0), -1) == "not identified"


def test_a_category_has_shap_values_but_no_accumulated_effect(table, forests, draws, attribution):
    with pytest.raises(UserError, match="need an order"):
        local_effects(table, forests, draws, "block_type")
    effects = shap_effects(attribution, "block_type")
    assert [one.name for one in effects.curve()] == ["parallel", "sequential"]
    with pytest.raises(UserError, match="no category of block_type"):
        effects.contrast("parallel", "both")
