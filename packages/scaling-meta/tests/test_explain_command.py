"""The command `scaling-meta explain`, on the shipped database."""

import json

import pytest

from lmcore import cli
from scaling_meta.explain_command import Explain
from scaling_meta.predict_command import Predict


def run(capsys, *args):
    status = cli.main("scaling-meta", "", [Explain, Predict], ["explain", *map(str, args)])
    return status, *capsys.readouterr()


def test_tasks_are_explained_with_curves_pairs_noise_and_answers(tmp_path, capsys):
    status, out, _ = run(capsys, "--task", "lambada", "anli", "--draws", 20, "--trees", 30, "--out", tmp_path / "out", "--json")
    result = json.loads(out)
    assert status == 0
    assert json.loads((tmp_path / "out" / "explain.json").read_text()) == result
    lambada = result["tasks"]["lambada"]
    assert (lambada["models"], lambada["families"]) == (92, 27)
    largest = max(lambada["importance"], key=lambda row: row["held_out"]["value"])
    assert largest["feature"] == "log_params"
    assert {row["group"] for row in lambada["groups"]} == {"scaling", "architecture", "data"}
    curve = lambada["curves"]["share_code"]["held_out"]
    assert [one["models"] for one in curve] == [5, 37, 3, 7, 7, 5]
    assert curve[4]["families"] == ["CodeGen"]
    assert curve[4]["support"] == "weak"
    answers = {answer["question"]: answer for answer in lambada["questions"]}
    assert answers["code_much"]["held_out"]["contrast"]["difference"]["value"] < 0
    assert answers["rotary"]["in_sample"]["verdict"] == "not identified"
    assert answers["rotary"]["in_sample"]["contrast"]["below"]["families"] == ["Cerebras-GPT"]
    assert 0 < lambada["noise"]["floor"] < lambada["mae"]
    assert lambada["next"] == []
    anli = result["tasks"]["anli"]
    assert anli["noise"] is None
    assert len(anli["next"]) == 5
    assert result["similarity"]["tasks"] in (["lambada", "anli"], ["anli", "lambada"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"explain.json", "importance.csv", "curves.csv", "pairs.csv", "lambada.png", "anli.png"}
    assert len((tmp_path / "out" / "importance.csv").read_text().splitlines()) == 1 + 2 * 18


def test_people_get_the_answers_and_what_stands_behind_them(tmp_path, capsys):
    table = tmp_path / "planned.csv"
    table.write_text("model,params,tokens_billions,share_code\nusual,7e9,1000,8\nunusual,1e8,18000,90\n")
    status, out, _ = run(capsys, "--task", "truthfulqa", "--draws", 20, "--trees", 10, "--candidates", table, "--count", 1)
    assert status == 0
    assert "evaluate next: unusual" in out
    assert "truthfulqa: 69 models of 23 families" in out
    assert "Are models with more data from the web less truthful? Expected lower: " in out
    assert out.count("  difference, ") == 2 + 3  # a category has no accumulated effects
    assert "training data deduplicated" in out
    assert "evaluation noise: MAE cannot be below 0.01" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "lambda"], "there is no benchmark lambda: they are arc_challenge"),
        (["--draws", "5"], "--draws is at least 20"),
        (["--task", "lambada", "--out", "."], "exists: pass --overwrite"),
        (["--task", "lambada", "--database", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_options_end_with_one_line(capsys, args, message):
    status, _, error = run(capsys, *args)
    assert status == 2
    assert message in error
