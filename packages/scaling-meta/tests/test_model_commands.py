"""The commands fit, cv and select, on the shipped database."""

import json

import pytest

from lmcore import cli
from scaling_meta.cv_command import Cv
from scaling_meta.fit_command import Fit
from scaling_meta.saved_model import SavedModel
from scaling_meta.select_command import Select, with_discovery_rates


def run(capsys, *args):
    status = cli.main("scaling-meta", "", [Fit, Cv, Select], [*map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fit_writes_a_model_and_measures_it_on_unseen_families(tmp_path, capsys):
    args = ("fit", "--task", "truthfulqa", "--model", "log-linear", "--out", tmp_path / "fit")
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0
    result = json.loads(out)
    assert (result["models"], result["features"][:2]) == (69, ["log_params", "log_tokens"])
    assert result["mae_interval"][0] < result["unseen_families"]["mae"] < result["mae_interval"][1]
    assert result["unseen_families"]["mae"] == pytest.approx(0.0376, abs=0.002)  # as another implementation measured it
    assert result["training"]["mae"] < result["unseen_families"]["mae"]
    read = SavedModel.read(tmp_path / "fit" / "model.json")
    assert (read.benchmark, len(read.y)) == ("truthfulqa", 69)
    status, _, err = run(capsys, *args)
    assert status == 2
    assert "pass --overwrite" in err
    status, out, _ = run(capsys, *args, "--overwrite", "--features", "scaling", "share_code")
    assert status == 0
    assert "unseen families" in out
    assert SavedModel.read(tmp_path / "fit" / "model.json").table.features == ("log_params", "log_tokens", "share_code")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("fit", "--task", "glue", "--out", "x"), "there is no benchmark glue"),
        (("fit", "--task", "gsm8k", "--model", "ridge", "--out", "x"), "there is no model ridge"),
        (("fit", "--task", "gsm8k", "--features", "colour", "--out", "x"), "there is no feature colour"),
        (("cv", "--tasks", "glue"), "there is no benchmark glue"),
        (("cv", "--models", "ridge"), "there is no model ridge"),
        (("cv", "--splits", "weekday"), "there is no split weekday"),
        (("cv", "--seeds", "0"), "--seeds is at least 1"),
        (("cv", "--database", "nowhere"), "nowhere is not a folder"),
        (("select", "--out", "x", "--halves", "-1"), "--halves at least 0"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(args, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *args)
    assert status == 2
    assert complaint in err
    assert not [*tmp_path.iterdir()]


def test_cv_compares_models_by_what_is_held_out_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    out = tmp_path / "cv"
    models, splits = ("median", "log-linear"), ("random", "published", "family", "release", "largest", "compute")
    args = ("cv", "--tasks", "hellaswag", "gsm8k", "--models", *models, "--splits", *splits, "--out", out)
    status, text, _ = run(capsys, *args, "--json")
    assert status == 0
    result = json.loads(text)
    mae = {(row["task"], row["split"], row["model"]): row["mae"] for row in result["rows"]}
    assert len(mae) == 2 * 2 * 6
    assert 0.114 < mae["hellaswag", "random", "median"] < 0.12  # 0.114 is the median of all models on themselves
    assert mae["hellaswag", "random", "log-linear"] == pytest.approx(0.0434, abs=0.002)
    assert mae["gsm8k", "largest", "log-linear"] == pytest.approx(0.256, abs=0.01)
    whole = (out / "cv.json").read_bytes()
    (out / "cv.json").unlink()
    (out / "gsm8k.json").unlink()
    kept, calls = Cv._rows, []
    monkeypatch.setattr(Cv, "_rows", lambda self, task: calls.append(task) or kept(self, task))
    status, text, _ = run(capsys, *args)
    assert (status, calls) == (0, ["gsm8k"])
    assert (out / "cv.json").read_bytes() == whole
    assert "log-linear" in text
    status, _, err = run(capsys, *args, "--seeds", "4")
    assert status == 2
    assert "a run with other options" in err


def test_select_shows_the_published_gain_beside_the_honest_ones(tmp_path, capsys, monkeypatch):
    published = {"features": ["log_params"], "gain": [0.2, 0.1, 0.3, 0.95], "naive_p": 0.001, "corrected_p": 0.2}
    monkeypatch.setattr("scaling_meta.select_command._published", lambda *_: published)  # takes minutes; see test_selection
    out = tmp_path / "select"
    args = (
        "select",
        "--tasks",
        "truthfulqa",
        "--features",
        "scaling",
        "share_web",
        "--search-seeds",
        1,
        "--halves",
        2,
        "--as-published",
    )
    status, text, _ = run(capsys, *args, "--out", out, "--json")
    assert status == 0
    [one] = json.loads(text)["tasks"]
    for split in ("random", "family", "compute"):
        value, low, high, _ = one[split]["gain"]
        assert low <= value <= high
        assert value == pytest.approx(1 - one[split]["after"] / one[split]["before"])
        assert set(one[split]["frequency"]) <= {"share_web"}
        assert one[split]["family_q"] == one[split]["family_p"]
    assert "corrected_p" not in one["compute"]
    assert set(one["stability"]) == {"share_web"}
    before = (out / "select.json").read_bytes()
    monkeypatch.setattr("scaling_meta.select_command._honest", lambda *_: pytest.fail("made again"))
    (out / "truthfulqa-stability.json").unlink()
    status, text, _ = run(capsys, *args, "--out", out)
    assert status == 0
    assert (out / "select.json").read_bytes() == before
    assert "20.0%" in text


def test_false_discovery_rates_are_over_the_tasks():
    tasks = [{"random": {"family_p": p}, "family": {}, "compute": {}} for p in (0.01, 0.04, 0.03)]
    assert [one["random"]["family_q"] for one in with_discovery_rates(tasks)] == pytest.approx([0.03, 0.04, 0.04])
