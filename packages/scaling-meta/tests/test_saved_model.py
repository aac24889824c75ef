"""A model file is what a fit depends on: read again, it predicts the same."""

import json

import numpy as np
import pytest

from lmcore.errors import UserError
from scaling_meta.regressors import REGRESSORS, regressor
from scaling_meta.saved_model import SavedModel
from scaling_meta.schema import BENCHMARKS

from .synthetic import code_score, table


def saved(name="log-linear"):
    some = table(families=8)
    some.values[3, 2] = np.nan
    return SavedModel("anli", name, regressor(name, BENCHMARKS["anli"]), some, code_score(table(families=8)))


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_model_that_is_read_predicts_what_the_fitted_one_did(name, tmp_path):
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    model = saved(name)
    model.write(tmp_path / "model.json")
    read, other = SavedModel.read(tmp_path / "model.json"), table(seed=4)
    assert read.regressor == model.regressor
    assert (read.benchmark, read.name, read.table.families) == ("anli", name, model.table.families)
    assert np.array_equal(read.fit().predict(other), model.fit().predict(other))


def edited(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "other"}, "is not a model of this version"),
        ({"regressor": "ridge"}, "is not a model of this version"),
        ({"models": ["m0"]}, "is damaged or was edited"),
        ({"options": {"depth": 3}}, "is damaged or was edited"),
        ({"benchmark": "glue"}, "is damaged or was edited"),
        ({"y": [0.5] * 40}, "predicted otherwise when it was written"),
        ({"predicted": []}, "predicted otherwise when it was written"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_refused(changes, complaint, tmp_path):
    path = tmp_path / "model.json"
    saved().write(path)
    edited(path, **changes)
    with pytest.raises(UserError, match=complaint):
        SavedModel.read(path)


def test_no_file_and_no_json_are_refused(tmp_path):
    path = tmp_path / "model.json"
    with pytest.raises(UserError, match="cannot be read"):
        SavedModel.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        SavedModel.read(path)
