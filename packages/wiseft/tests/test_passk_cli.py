import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmcore import cli
from lmcore.errors import UserError
from wiseft.passk import pass_at_k
from wiseft.passk_command import PassK
from wiseft.summary import summarize

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/example_model_solutions.jsonl"
QUICK = {"replicates": 200}


@pytest.fixture
def models(tmp_path):
    """Samples of a diverse and of a collapsed model on the same 40 problems, 16 samples each."""
    rng = np.random.default_rng(0)
    rho = rng.beta(0.4, 0.7, 40)
    for name, rates in (("wise", 0.1 + 0.8 * rho), ("late", rho)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for problem, rate in enumerate(rates):
                for correct in (rng.random(16) < rate).tolist():
                    answer = "42" if correct else None if rng.random() < 0.1 else str(rng.integers(3))
                    row = {"problem": problem, "correct": correct, "answer": answer, "score": rng.normal(float(correct))}
                    file.write(json.dumps(row) + "\n")
    return tmp_path / "wise.jsonl", tmp_path / "late.jsonl"


def read_counts(path):
    verdicts = {}
    for row in map(json.loads, path.read_text().splitlines()):
        verdicts.setdefault(row["problem"], []).append(row["correct"])
    return np.array(list(map(sum, verdicts.values())))


def test_one_model_gives_the_estimates_and_a_page(models, tmp_path):
    out = tmp_path / "out"
    result = PassK(files=models[:1], k=(1, 4, 16), out=out, **QUICK).run()
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert {path.name for path in out.iterdir()} == {
        "result.json", "index.html", "pass_at_k.svg", "bias_variance.svg", "histogram.svg",
    }  # fmt: skip
    correct = read_counts(models[0])
    rows = {row["k"]: row for row in result["models"][0]["pass_at_k"]}
    assert [rows[k]["value"] for k in (1, 4, 16)] == pytest.approx(pass_at_k(16, correct, [1, 4, 16]).mean(axis=0).tolist())
    assert rows[4]["interval"] == summarize(16, correct, [1, 4], **QUICK).pass_at_k[1].interval
    page = (out / "index.html").read_text()
    assert "<svg" in page
    assert f"{rows[4]['value']:.2%}" in page


def test_without_k_the_powers_of_two_are_taken(models, tmp_path):
    assert PassK(files=models[:1], out=tmp_path / "out", **QUICK).run()["k"] == [1, 2, 4, 8, 16]


def test_two_models_are_compared_problem_by_problem(models, tmp_path):
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(sorted(models[1].read_text().splitlines(keepends=True), key=hash)))
    results = [
        PassK(files=models[:1], compare=(other,), k=(1, 8), out=tmp_path / other.stem, **QUICK).run()
        for other in (models[1], shuffled)
    ]
    row = next(row for row in results[0]["comparison"]["pass_at_k"] if row["k"] == 8)
    gain = pass_at_k(16, read_counts(models[0]), 8) - pass_at_k(16, read_counts(models[1]), 8)
    assert row["value"] == pytest.approx(gain.mean())
    assert row["p_value"] < 0.05
    assert results[1]["comparison"] == results[0]["comparison"]
    assert (tmp_path / "late" / "difference.svg").exists()
    assert "wise minus late" in (tmp_path / "late" / "index.html").read_text()


def test_votes_are_added_where_they_are_asked_for(models, tmp_path):
    result = PassK(files=models[:1], k=(1, 5), majority=True, best=True, out=tmp_path / "out", **QUICK).run()
    model = result["models"][0]
    single = next(row["value"] for row in model["pass_at_k"] if row["k"] == 1)
    for name in ("majority_at_k", "best_at_k"):
        first, fifth = model[name]
        assert first["value"] == pytest.approx(single)  # one sample is its own majority and its own best
        assert single < fifth["value"] < 1
        assert fifth["interval"][0] < fifth["value"] < fifth["interval"][1]
    assert model["majority_at_k"][1]["drawing_error"] == 0


def test_target_width_says_what_is_still_needed(models, tmp_path):
    result = PassK(files=models[:1], k=(1, 16), target_width=0.02, out=tmp_path / "out", **QUICK).run()
    first, last = result["models"][0]["needed"]
    assert first["problems"] > 40
    assert first["width"] > 0.02
    assert last["samples_per_problem"] is None


def test_same_command_gives_the_same_bytes_and_replaces_only_when_told(models, tmp_path):
    command = PassK(files=models[:1], k=(1, 4), out=tmp_path / "out", overwrite=True, **QUICK)
    command.run()
    before = {path.name: path.read_bytes() for path in command.out.iterdir()}
    command.run()
    assert {path.name: path.read_bytes() for path in command.out.iterdir()} == before
    with pytest.raises(UserError, match=r"exists: .*--overwrite"):
        PassK(files=models[:1], k=(1,), out=tmp_path / "out").run()
    assert (command.out / "result.json").read_bytes() == before["result.json"]


def test_an_out_that_holds_an_input_is_refused(models, tmp_path):
    data, links = tmp_path / "data", tmp_path / "links"
    data.mkdir()
    links.mkdir()
    first, second = data / "wise.jsonl", links / "late.jsonl"
    models[0].rename(first)
    second.symlink_to(models[1])
    (tmp_path / "alias").symlink_to(data)
    (data / "result.json").touch()  # so that only the inputs speak against the folder
    (data / "index.html").touch()
    for out in (data, tmp_path / "alias", data / "..", tmp_path, links, Path("/")):
        with pytest.raises(UserError, match=r"holds, the folder of the input .*: choose another --out"):
            PassK(files=(first,), compare=(second,), out=out, overwrite=True, **QUICK).run()
    assert first.exists()
    assert second.is_symlink()
    PassK(files=(first,), compare=(second,), out=data / "report", overwrite=True, **QUICK).run()
    assert (data / "report" / "index.html").exists()


def test_overwrite_replaces_nothing_but_a_report(models, tmp_path):
    thesis, empty = tmp_path / "thesis", tmp_path / "empty"
    thesis.mkdir()
    empty.mkdir()
    (thesis / "result.json").write_text("mine")
    with pytest.raises(UserError, match="holds files but no report of passk: remove it or choose another"):
        PassK(files=models[:1], out=thesis, overwrite=True, **QUICK).run()
    assert (thesis / "result.json").read_text() == "mine"
    PassK(files=models[:1], out=empty, overwrite=True, **QUICK).run()
    assert (empty / "index.html").exists()


def test_a_model_can_be_compared_with_itself(models, tmp_path):
    command = PassK(files=models[:1], compare=(models[0].parent / "." / models[0].name,), out=tmp_path / "out", **QUICK)
    result = command.run()
    assert [model["name"] for model in result["models"]] == ["wise (1)", "wise (2)"]
    assert {row["value"] for row in result["comparison"]["pass_at_k"]} == {0.0}
    command.show(result)


def test_bad_input_leaves_nothing_behind(models, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"problem": 1, "n": 4}\n')
    (tmp_path / "mute.jsonl").write_text('{"problem": 1, "correct": true}\n{"problem": 2, "correct": false, "score": 1}\n')
    (tmp_path / "unsure.jsonl").write_text(
        '{"problem": "x", "correct": true, "answer": "1"}\n{"problem": "x", "correct": false, "answer": "1"}\n'
    )
    for options, message in (
        ({"files": (tmp_path / "bad.jsonl",)}, "bad.jsonl, line 1"),
        ({"files": models[:1], "k": (17,)}, 'problem "0" has 16 samples, fewer than k = 17'),
        ({"files": models[:1], "k": (0,)}, "--k"),
        ({"files": models[:1], "level": 1.0}, "--level 1.0"),
        ({"files": models[:1], "level": float("nan")}, "--level nan"),
        ({"files": models[:1], "level": 1 - 2**-53}, "--level 0.9999"),
        ({"files": models[:1], "replicates": 2}, "--replicates 2: it must be at least 100"),
        ({"files": models[:1], "seed": -1}, "--seed -1: it must not be negative"),
        ({"files": models[:1], "target_width": 2.0}, "--target-width 2.0"),
        ({"files": models[:1], "compare": (tmp_path / "mute.jsonl",)}, "only the first model has"),
        ({"files": (tmp_path / "mute.jsonl",), "majority": True}, "no sample of these files has an answer"),
        ({"files": (tmp_path / "mute.jsonl",), "best": True}, 'problem "1" has samples without a score'),
        (
            {"files": (tmp_path / "unsure.jsonl",), "majority": True, "k": (1,)},
            'problem "x": the answer .* both correct and wrong',
        ),
    ):
        with pytest.raises(UserError, match=message):
            PassK(out=tmp_path / "out", **options).run()
        assert not any("out" in path.name for path in tmp_path.iterdir()), options


def test_the_command_line_prints_tables_or_json(models, tmp_path, capsys):
    words = [
        "passk",
        *map(str, models[:1]),
        "--k",
        "1",
        "4",
        "--compare",
        str(models[1]),
        "--target-width",
        "0.1",
        "--replicates",
        "200",
    ]
    assert cli.main("wiseft", "test", [PassK], [*words, "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "wise: 40 problems, 16 samples each; bias" in printed
    assert "95% interval" in printed
    assert "Pass@4: the interval is" in printed
    assert "wise minus late" in printed
    assert cli.main("wiseft", "test", [PassK], [*words, "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "b" / "result.json").read_text())
    assert cli.main("wiseft", "test", [PassK], ["passk", "none.jsonl", "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.strip() == "wiseft: none.jsonl: No such file or directory"


def test_a_single_sample_per_problem_has_no_variance_and_still_a_page(tmp_path):
    (tmp_path / "greedy.jsonl").write_text("".join(f'{{"problem": {i}, "n": 1, "c": {i % 2}}}\n' for i in range(6)))
    command = PassK(files=(tmp_path / "greedy.jsonl",), out=tmp_path / "out", **QUICK)
    result = command.run()
    assert result["models"][0]["variance"] is None
    assert not (tmp_path / "out" / "bias_variance.svg").exists()
    command.show(result)


def test_importing_the_command_is_light():
    heavy = ["numpy", "numba", "torch", "matplotlib", "orjson", "tqdm"]
    code = f"import sys, wiseft.passk_command; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K solutions are not at hand")
def test_real_solvers_rank_as_their_authors_found(tmp_path):
    """Verification beats fine-tuning at both sizes (Cobbe et al. 2021), and so do the paired intervals."""
    for line_number, line in enumerate(GSM8K.read_text().splitlines()):
        for model, judged in json.loads(line).items():
            if isinstance(judged, dict):
                with open(tmp_path / f"{model}.jsonl", "a") as file:
                    file.write(json.dumps({"problem": line_number, "correct": judged["is_correct"]}) + "\n")
    for size in ("6b", "175b"):
        files, other = (tmp_path / f"{size}_verification.jsonl",), (tmp_path / f"{size}_finetuning.jsonl",)
        result = PassK(files=files, compare=other, k=(1,), out=tmp_path / size, replicates=1000).run()
        (row,) = result["comparison"]["pass_at_k"]
        assert row["interval"][0] > 0
        assert row["p_value"] < 0.01
