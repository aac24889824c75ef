"""The commands `scaling-meta whatif` and `scaling-meta predict`, on the shipped database."""

import json

import pytest

from lmcore import cli
from scaling_meta.predict_command import Predict
from scaling_meta.whatif_command import WhatIf


def run(capsys, *args):
    status = cli.main("scaling-meta", "", [WhatIf, Predict], [*map(str, args)])
    return status, *capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    """A model like Pythia, without its weights."""
    config = {
        "model_type": "gpt_neox", "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192, "hidden_act": "gelu",
        "max_position_embeddings": 2048, "use_parallel_residual": True, "rotary_pct": 0.25, "num_hidden_layers": 24, "vocab_size": 50304,
        "attention_bias": True,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


GIVEN = ("params=1.4e9", "tokens_billions=300", "share_code=8", "share_web=37", "share_academic=28")


def test_a_change_is_predicted_with_intervals_and_what_they_promise(capsys):
    status, out, _ = run(
        capsys, "whatif", "SmolLM-1.7B", "--task", "humaneval", "--set", "share_code=20", "--from", "share_web",
        "--regressor", "log-linear", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert status == 0
    assert result["model"] == "HuggingFaceTB/SmolLM-1.7B"
    assert result["changed"] == {"share_web": [87.3, pytest.approx(69.28)], "share_code": [1.98, 20.0]}
    assert result["change"]["value"] == pytest.approx(0)  # that of log-linear has no shares
    assert 0 <= result["before"]["low"] <= result["before"]["value"] <= result["before"]["high"] <= 1
    assert "at least 80% (about 90% in practice)" in result["guarantee"]
    assert len(result["nearest"]) == 3


def test_people_get_three_rows_and_the_measured_score(capsys):
    status, out, _ = run(
        capsys,
        "whatif",
        "01-ai/Yi-9B",
        "--task",
        "lambada",
        "--set",
        "share_code=20",
        "--from",
        "share_web",
        "--regressor",
        "log-linear",
    )
    assert status == 0
    assert "share_code: 8.53 -> 20.0" in out
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["before", "after", "change"]
    assert "measured before: 0." in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "share_code=20"], "would sum to 112 %: say which shrink"),
        (
            ["--set", "share_code=20", "tokens_billions=50000", "--from", "share_web"],
            "lies outside what was fitted to: log_tokens 5e+13",
        ),
        (["--set", "positional_embeddings=learned"], "only Cerebras-GPT has models with about this positional_embeddings"),
        (["--set", "share_code=20", "--from", "share_web"], "the nearest model with about this share_code, "),
        (["--set", "share_code"], "--set share_code: write NAME=VALUE"),
        (["--set", "share_code=20", "--given", "params=3"], "--given is for a model folder"),
    ],
)
def test_what_has_no_answer_ends_with_the_reason(capsys, args, message):
    status, _, error = run(capsys, "whatif", "EleutherAI/pythia-12b", "--task", "lambada", "--regressor", "log-linear", *args)
    assert status == 2
    assert message in error


def test_unknown_models_are_refused(capsys):
    status, _, error = run(capsys, "whatif", "pythia-13b", "--task", "lambada", "--set", "share_code=20")
    assert (status, "no model pythia-13b" in error) == (2, True)


def test_a_folder_is_predicted_on_benchmarks_with_its_nearest_models(folder, capsys):
    status, out, _ = run(
        capsys, "predict", folder, "--tasks", "lambada", "anli", "--regressor", "log-linear", "--json", "--set", *GIVEN
    )
    result = json.loads(out)
    assert status == 0
    assert result["design"]["tokens_billions"] == 300
    assert result["design"]["positional_embeddings"] == "rope"
    lambada, anli = result["tasks"]
    assert 0 <= lambada["low"] < lambada["value"] < lambada["high"] <= 1
    assert 0 <= anli["low"] < anli["value"] < anli["high"] <= 2
    assert lambada["nearest"][0]["distance"] < lambada["nearest"][2]["distance"] < 0.2
    assert run(capsys, "predict", folder, "--tasks", "lambada", "--regressor", "log-linear", "--set", *GIVEN)[1].startswith(
        "benchmark"
    )


def test_saved_fits_predict_what_they_were_fitted_to(folder, tmp_path, capsys):
    from scaling_meta.database import Database
    from scaling_meta.regressors import regressor
    from scaling_meta.saved_model import SavedModel
    from scaling_meta.tasks import read_task

    task = read_task(Database.shipped(), "lambada", ("log_params", "log_tokens", "dimension"))
    (tmp_path / "fit").mkdir()
    SavedModel("lambada", "log-linear", regressor("log-linear"), task.table, task.y).write(tmp_path / "fit" / "model.json")
    status, out, _ = run(capsys, "predict", folder, "--fit", tmp_path / "fit", "--json", "--set", *GIVEN[:2])
    (fitted,) = json.loads(out)["tasks"]
    status, out, _ = run(
        capsys, "predict", folder, "--tasks", "lambada", "--regressor", "log-linear", "--json", "--set", *GIVEN
    )
    (made,) = json.loads(out)["tasks"]
    assert status == 0
    assert [fitted[name] for name in ("value", "low", "high")] == [made[name] for name in ("value", "low", "high")]


def test_a_folder_can_be_changed_too(folder, capsys):
    options = ("--task", "lambada", "--regressor", "log-linear", "--json", "--given", *GIVEN)
    status, out, _ = run(capsys, "whatif", folder, "--set", "tokens_billions=600", *options)
    assert status == 0
    assert json.loads(out)["change"]["value"] > 0


def test_a_design_beyond_all_models_is_not_predicted(folder, capsys):
    given = ("params=1e12", *GIVEN[1:])
    status, _, error = run(capsys, "predict", folder, "--tasks", "lambada", "--regressor", "log-linear", "--set", *given)
    assert status == 2
    assert "no benchmark can be predicted; lambada: model lies outside what was fitted to: log_params 1e+12" in error
    status, _, error = run(capsys, "predict", folder, "--tasks", "lambada", "--set", "params=1e9")
    assert (status, "give tokens_billions" in error) == (2, True)
