"""The next models to evaluate are those that teach most, and beat a random choice."""

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.next_model import next_models
from scaling_meta.table import Table


def models(values, families, prefix="m") -> Table:
    features = ("log_params", "log_tokens", "share_code")
    names = tuple(f"{prefix}{row}" for row in range(len(values)))
    return Table(names, features, np.array(values, np.float64), {}, tuple(families), ("",) * len(values))


def test_a_design_unlike_those_evaluated_comes_before_a_twin():
    evaluated = models([[20, 25, 5], [21, 25, 6], [22, 26, 5]], "ABC")
    candidates = models([[21, 25, 6], [24, 28, 60], [21.1, 25, 6]], "BDB", "c")
    order = [one.model for one in next_models(evaluated, np.array([0.1, 0.2, 0.3]), candidates)]
    assert order[0] == "c1"
    assert len(order) == 3


def test_a_second_sibling_teaches_less_than_one_of_another_family():
    random = np.random.default_rng(0)
    evaluated = models(random.normal(0, 1, (30, 3)), [f"f{row // 3}" for row in range(30)])
    y = np.repeat(random.normal(0, 1, 10), 3) + random.normal(0, 0.1, 30)  # families matter
    candidates = models([[3, 0, 0], [3, 0, 0], [3, 0, 0]], ["new", "new", "other"], "c")
    found = next_models(evaluated, y, candidates, targets=models([[0, 0, 0]] * 4, ["new", "new", "other", "other"], "t"))
    assert [one.model for one in found] == ["c0", "c2", "c1"]
    reductions = [one.reduction for one in found]
    assert reductions == sorted(reductions)
    assert 0 < reductions[0] < 1


def test_the_reductions_are_those_of_the_posterior_variances():
    from scaling_meta.next_model import _encoded, _likeliest

    random = np.random.default_rng(2)
    evaluated, candidates = (
        models(random.normal(0, 1, (12, 3)), "AABBCCDDEEFF"),
        models(random.normal(0, 1, (4, 3)), "AGGH", "c"),
    )
    y = random.normal(0, 1, 12)
    found = next_models(evaluated, y, candidates, count=2)
    done, pool = _encoded([evaluated, candidates])
    model = _likeliest(done, y)
    values, families = np.concatenate([done.values, pool.values]), done.families + pool.families
    prior = model.kernel(type(done)(values, families), type(done)(values, families))

    def variance(rows):
        return np.trace(prior - prior[:, rows] @ np.linalg.solve(prior[np.ix_(rows, rows)] + np.eye(len(rows)), prior[rows]))

    rows, start = [*range(12)], variance([*range(12)])
    best = max(range(4), key=lambda place: start - variance([*rows, 12 + place]))
    assert found[0].model == f"c{best}"
    rows += [12 + candidates.models.index(one.model) for one in found]
    assert found[1].reduction == pytest.approx(1 - variance(rows) / start, abs=1e-6)


def test_it_beats_a_random_choice():
    random, chosen_errors, random_errors = np.random.default_rng(3), [], []
    for _ in range(40):
        pool = np.column_stack([random.normal(0, 1, (60, 2)), random.exponential(1, 60)])
        table = models(pool, [f"f{row // 4}" for row in range(60)])
        y = pool @ random.normal(0, 1, 3) + np.repeat(random.normal(0, 0.5, 15), 4) + random.normal(0, 0.5, 60)
        start = np.arange(60) < 8
        found = {one.model for one in next_models(table.rows(start), y[start], table.rows(~start), count=6)}
        choices = (
            np.array([name in found for name in table.models]),
            np.isin(np.arange(60), random.choice(np.arange(8, 60), 6, replace=False)),
        )
        for errors, added in zip((chosen_errors, random_errors), choices, strict=True):
            rows = start | added
            design = np.column_stack([np.ones(60), pool])
            weights = np.linalg.solve(design[rows].T @ design[rows] + 0.3 * np.eye(4), design[rows].T @ y[rows])
            errors.append(np.square(design @ weights - y).mean())
    assert np.mean(chosen_errors) < 0.93 * np.mean(random_errors)


def test_the_order_is_the_same_every_time_and_empty_tables_are_refused():
    random = np.random.default_rng(4)
    table = models(random.normal(0, 1, (10, 3)), [f"f{row}" for row in range(10)])
    y = random.normal(0, 1, 10)
    assert next_models(table, y, table) == next_models(table, y, table)
    with pytest.raises(UserError, match="0 candidates"):
        next_models(table, y, table.rows(np.array([], np.int64)))
