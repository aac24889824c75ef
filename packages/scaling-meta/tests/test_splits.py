"""What is held out, and that nothing is on both sides."""

import numpy as np
import pytest
from sklearn.model_selection import KFold, train_test_split

from lmcore.errors import UserError
from scaling_meta.splits import SPLITS, family_folds, largest, random_folds, release_cutoffs

from .synthetic import table


@pytest.mark.parametrize("name", SPLITS)
def test_no_model_is_on_both_sides_or_tested_twice_in_a_repeat(name):
    some = table()
    splits = SPLITS[name](some, (0, 1))
    for one in splits:
        assert not {*one.train} & {*one.test}
        assert len(one.train)
        assert len(one.test)
    for repeat in {one.repeat for one in splits}:
        tested = np.concatenate([one.test for one in splits if one.repeat == repeat])
        assert len(tested) == len({*tested})
        if name in ("random", "published", "family"):
            assert len(tested) == len(some)


def test_random_folds_are_those_of_the_paper():
    found = random_folds(92, seeds=(7,), set_aside=0.2)
    for one, (train, test) in zip(found, KFold(3, shuffle=True, random_state=7).split(np.empty(92)), strict=True):
        assert np.array_equal(one.test, test)
        assert np.array_equal(one.train, train_test_split(train, test_size=0.2, random_state=7)[0])


def test_a_family_is_held_out_whole():
    some = table(families=4, siblings=3)
    for one in family_folds(some.families):
        assert {some.families[row] for row in one.test} == {one.held_out}
        assert one.held_out not in {some.families[row] for row in one.train}


def test_later_releases_are_tested_and_models_without_a_date_are_in_neither_part():
    months = ["2022-01", "", "2022-03", "2022-03", "2022-09", "2023-01", ""]
    for one in release_cutoffs(months):
        month = one.held_out.removeprefix("from ")
        assert {*one.test} == {row for row, at in enumerate(months) if at >= month and at}
        assert {*one.train} == {row for row, at in enumerate(months) if "" < at < month}
    assert [one.held_out for one in release_cutoffs(months)] == ["from 2022-03", "from 2022-09", "from 2023-01"]


def test_extrapolation_holds_out_the_largest():
    some = table()
    [by_size], [by_compute] = SPLITS["largest"](some, ()), SPLITS["compute"](some, ())
    assert len(by_size.test) == 5
    assert some.column("log_params")[by_size.test].min() >= some.column("log_params")[by_size.train].max()
    assert len(by_compute.test) == 12
    assert some.flops[by_compute.test].min() >= some.flops[by_compute.train].max()


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="2 models with a score cannot be divided into 3 folds"):
        random_folds(2)
    with pytest.raises(UserError, match="2 models of 1 family"):
        family_folds(["Llama", "Llama"])
    with pytest.raises(UserError, match="a cut-off needs two"):
        release_cutoffs(["2022-01", "", "2022-01"])
    with pytest.raises(UserError, match="largest 5 of 5"):
        largest(np.arange(5.0), 5)
    with pytest.raises(UserError, match="1 of unknown size"):
        largest(np.array([1.0, np.nan, 3.0]), 1)
