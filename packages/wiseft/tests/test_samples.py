import gzip
import json
import os
from pathlib import Path

import pytest

from lmcore.errors import UserError
from wiseft import samples as samples_module
from wiseft.samples import read_samples

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/example_model_solutions.jsonl"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counts(read):
    return dict(zip(read.problems, zip(read.samples.tolist(), read.correct.tolist(), strict=True), strict=True))


def harness_row(doc_id, exact_match, *, answer="18", filter="strict-match", **other):
    """A row as lm-evaluation-harness 0.4 logs it."""
    return {
        "doc_id": doc_id,
        "doc": {"question": "How many eggs?", "answer": "#### 18"},
        "target": "#### 18",
        "arguments": {"gen_args_0": {"arg_0": "Q: How many eggs?\nA:", "arg_1": {"until": ["\n\n"]}}},
        "resps": [[f"She has {answer}. #### {answer}"]],
        "filtered_resps": [answer],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": f"{doc_id:064x}",
        "prompt_hash": "c3" * 32,
        "target_hash": "5a" * 32,
        "exact_match": exact_match,
    } | other


def test_counts_are_read_as_they_stand(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "p", "n": 8, "c": 3}, {"problem": 7, "n": 4, "c": 0, "note": "more keys"})
    read = read_samples([path])
    assert counts(read) == {"p": (8, 3), "7": (4, 0)}
    assert read.ballots is None


def test_samples_add_up_over_lines_and_files(tmp_path):
    first = write(tmp_path / "a.jsonl", {"problem": "p", "correct": True}, {"problem": "q", "correct": False})
    second = write(tmp_path / "b.jsonl", {"problem": "p", "correct": 0}, {"problem": "p", "correct": 1.0})
    assert counts(read_samples([first, second])) == {"p": (3, 2), "q": (1, 0)}


def test_gzip_is_recognised_by_its_content_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "samples.jsonl"  # no .gz
    path.write_bytes(gzip.compress(b'\n{"problem": "p", "correct": true}\n\n{"problem": "p", "correct": false}'))
    assert counts(read_samples([path])) == {"p": (2, 1)}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_pipe_is_read_like_a_file(pack):
    source, sink = os.pipe()
    os.write(sink, pack(b'{"problem": "p", "correct": true}\n' * 20))
    os.close(sink)
    try:
        assert counts(read_samples([Path(f"/dev/fd/{source}")])) == {"p": (20, 20)}
    finally:
        os.close(source)


def test_many_blocks_give_the_same_counts_as_one(tmp_path, monkeypatch):
    rows = [{"problem": f"p{i % 1500}", "correct": i % 7 == 0, "answer": str(i % 3)} for i in range(6000)]
    path = write(tmp_path / "a.jsonl", *rows)
    whole = read_samples([path], votes=True)
    monkeypatch.setattr(samples_module, "_BLOCK_BYTES", 100)
    blocks = read_samples([path], votes=True)
    assert counts(blocks) == counts(whole)
    assert blocks.ballots == whole.ballots
    assert counts(whole)["p7"] == (4, sum(i % 7 == 0 for i in range(7, 6000, 1500)))


def test_ballots_hold_answers_scores_and_verdicts_in_order(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"problem": "p", "correct": True, "answer": "18", "score": 0.5},
        {"problem": "q", "correct": False},
        {"problem": "p", "correct": False, "answer": 20, "score": -1},
    )
    ballots = read_samples([path], votes=True).ballots
    assert ballots.answers == [["18", "20"], [None]]
    assert ballots.scores == [[0.5, -1.0], [None]]
    assert ballots.verdicts == [[True, False], [False]]


def test_harness_logs_of_several_seeds_are_samples_of_the_same_problems(tmp_path):
    seeds = [
        write(tmp_path / f"samples_gsm8k_{seed}.jsonl", harness_row(0, 1.0), harness_row(1, float(seed), answer="[invalid]"))
        for seed in (0, 1)
    ]
    assert counts(read_samples(seeds)) == {"0#00000000": (2, 2), "1#00000000": (2, 1)}
    answers = read_samples(seeds[:1], votes=True).ballots.answers
    assert answers == [["18"], [None]]  # the harness writes [invalid] where its regular expression finds nothing


def test_harness_documents_of_different_tasks_stay_apart(tmp_path):
    algebra = write(tmp_path / "a.jsonl", harness_row(0, 1.0, doc_hash="aaaaaaaaaaaa"))
    geometry = write(tmp_path / "b.jsonl", harness_row(0, 0.0, doc_hash="bbbbbbbbbbbb"))
    assert counts(read_samples([algebra, geometry])) == {"0#aaaaaaaa": (1, 1), "0#bbbbbbbb": (1, 0)}


def test_harness_filters_must_be_chosen_where_there_are_several(tmp_path):
    path = write(
        tmp_path / "a.jsonl", harness_row(0, 0.0, filter="strict-match"), harness_row(0, 1.0, filter="flexible-extract")
    )
    assert list(counts(read_samples([path], filter="flexible-extract")).values()) == [(1, 1)]
    with pytest.raises(UserError, match="filters flexible-extract, strict-match: choose one with --filter"):
        read_samples([path])
    with pytest.raises(UserError, match="--filter strict: the files hold flexible-extract, strict-match"):
        read_samples([path], filter="strict")


def test_harness_metrics_must_be_chosen_where_there_are_several(tmp_path):
    row = harness_row(3, 0.0, acc=1.0, acc_norm=0.0, resps=[[["-3.1", "False"]], [["-4.2", "False"]]])
    del row["metrics"], row["exact_match"]  # as early logs, which do not name their metrics
    path = write(tmp_path / "a.jsonl", row)
    assert list(counts(read_samples([path], metric="acc")).values()) == [(1, 1)]
    with pytest.raises(UserError, match=r"a.jsonl, line 1: the metrics are acc, acc_norm: choose one with --metric"):
        read_samples([path])
    with pytest.raises(UserError, match='line 1: there is no key "accuracy"'):
        read_samples([path], metric="accuracy")


def test_harness_repeats_count_where_the_metric_covers_all_of_them(tmp_path):
    code = {"resps": [["a", "b", "c", "d"]], "filtered_resps": [["a", "b", "c", "d"]], "metrics": ["pass@1", "pass@2"]}
    mean = write(tmp_path / "mean.jsonl", harness_row(0, 0, **code, **{"pass@1": 0.75, "pass@2": 1.0}))
    each = write(tmp_path / "each.jsonl", harness_row(0, [1, 0, 0, 1], **(code | {"metrics": ["exact_match"]})))
    first = write(tmp_path / "first.jsonl", harness_row(0, 1.0, resps=[["a", "b"]]))
    assert list(counts(read_samples([mean])).values()) == [(4, 3)]
    assert list(counts(read_samples([each])).values()) == [(4, 2)]
    assert read_samples([each], votes=True).ballots.answers == [["a", "b", "c", "d"]]
    with pytest.raises(UserError, match=r'first.jsonl, line 1: "exact_match" is one number for 2 repeats.* once per seed'):
        read_samples([first])


@pytest.mark.parametrize(
    ("mean", "responses"),
    [*((mean, ["a", "b"]) for mean in (float("inf"), float("nan"), -1.5, 2.0, 0.3, 10**400)), (0.5, [])],
)
def test_harness_means_that_no_verdicts_have_are_named(tmp_path, mean, responses):
    row = harness_row(0, 0, resps=[responses], filtered_resps=[responses], metrics=["pass@1"], **{"pass@1": mean})
    path = write(tmp_path / "bad.jsonl", row)
    with pytest.raises(UserError, match=rf'bad.jsonl, line 1: "pass@1" is .* no mean of {len(responses)} verdicts'):
        read_samples([path])


def test_evalplus_results_need_both_test_sets_unless_base_is_asked_for(tmp_path):
    def sample(base, plus):
        return {"task_id": "HumanEval/0", "solution": "def f(): ...", "base_status": base, "plus_status": plus}

    tasks = {"HumanEval/0": [sample("pass", "pass"), sample("pass", "fail"), sample("fail", "fail")], "HumanEval/1": []}
    path = write(tmp_path / "m_eval_results.json", {"date": "2025-01-01 10:00", "hash": "fe", "eval": tasks})
    assert counts(read_samples([path])) == {"HumanEval/0": (3, 1)}
    assert counts(read_samples([path], metric="base")) == {"HumanEval/0": (3, 2)}
    base_only = write(tmp_path / "b_eval_results.json", {"eval": {"HumanEval/0": [sample("pass", None)]}})
    assert counts(read_samples([base_only])) == {"HumanEval/0": (1, 1)}
    with pytest.raises(UserError, match="the extra tests were not run"):
        read_samples([base_only], metric="plus")
    old = write(tmp_path / "o_eval_results.json", {"eval": {"HumanEval/0": {"nfiles": 1, "base": [["success", []]]}}})
    with pytest.raises(UserError, match="an early evalplus"):
        read_samples([old])
    with pytest.raises(UserError, match="holds no samples"):
        read_samples([write(tmp_path / "none.json", {"eval": {}})])


def test_human_eval_results_are_samples(tmp_path):
    rows = [{"task_id": "HumanEval/0", "completion": "pass", "result": "passed", "passed": passed} for passed in (True, False)]
    assert counts(read_samples([write(tmp_path / "s.jsonl_results.jsonl", *rows)])) == {"HumanEval/0": (2, 1)}


GOOD = '{"problem": "p", "n": 4, "c": 1}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"problem": "q", "n": 4,'], "line 2: not JSON"),
        ([GOOD, "", '{"problem": "q", "n": 4}'], 'line 3: there is no key "c"'),
        ([GOOD, '{"problem": "q", "n": 4, "c": 5}'], "line 2: c = 5 correct of n = 4 samples"),
        ([GOOD, '{"problem": "q", "n": 4, "c": -1}'], 'line 2: "c" is -1'),
        ([GOOD, '{"problem": "q", "n": 0, "c": 0}'], 'line 2: "n" is 0'),
        ([GOOD, '{"problem": "q", "n": 1000001, "c": 0}'], 'line 2: "n" is 1000001: .* from 1 to 1,000,000'),
        ([GOOD, '{"problem": "q", "n": 4611686018427387904, "c": 0}'], 'line 2: "n" is 4611686018427387904'),
        ([GOOD, '{"problem": "q", "n": 9223372036854775808, "c": 0}'], 'line 2: "n" is 9223372036854775808'),
        ([GOOD, '{"problem": "q", "n": 4, "c": true}'], 'line 2: "c" is True'),
        ([GOOD, '{"problem": "q", "n": 4.0, "c": 1}'], 'line 2: "n" is 4.0'),
        ([GOOD, '{"problem": null, "n": 4, "c": 1}'], "line 2: the name of the problem is None"),
        (
            [GOOD, '{"problem": "q", "n": 4, "c": 0}', '{"problem": "p", "n": 4, "c": 2}'],
            "line 3: .* c = 2 here and n = 4, c = 1",
        ),
        ([GOOD, "[1, 2]"], r"line 2: expected a JSON object, got \[1, 2\]"),
        (['{"prompt": "x", "text": "y"}'], "line 1: the keys prompt, text are those of no known format"),
        (["7"], "line 1: expected a JSON object, got 7"),
        ([json.dumps(harness_row(0, 1.0, doc_hash=5))], "line 1: not the layout of its format"),
        (['{"problem": "p", "correct": "yes"}'], "line 1: the verdict is 'yes'"),
        (['{"problem": "p", "correct": [1]}'], r"line 1: the verdict is \[1\]"),
        (['{"problem": "p", "correct": 0.5}'], "line 1: the verdict is 0.5"),
        (
            ['{"problem": "p", "correct": true, "score": 1}', '{"problem": "p", "correct": true, "score": NaN}'],
            "line 2: the score is nan",
        ),
        (['{"problem": "p", "correct": true, "answer": ["a"]}'], "line 1: the answer is "),
        ([], "is empty"),
        ([" ", ""], "is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"bad\.jsonl.*{message}"):
        read_samples([path], votes=bool(lines) and "correct" in lines[0])


def test_counts_of_one_problem_in_two_files_must_agree(tmp_path):
    first = write(tmp_path / "a.jsonl", {"problem": "p", "n": 4, "c": 1}, {"problem": "q", "n": 4, "c": 1})
    same = write(tmp_path / "b.jsonl", {"problem": "p", "n": 4, "c": 1})
    other = write(tmp_path / "c.jsonl", {"problem": "r", "n": 4, "c": 1}, {"problem": "p", "n": 8, "c": 1})
    with pytest.warns(UserWarning, match="1 rows repeat a problem"):
        assert counts(read_samples([first, same])) == {"p": (4, 1), "q": (4, 1)}
    with pytest.raises(UserError, match=r'c.jsonl, line 2: problem "p" has n = 8, c = 1 here and n = 4, c = 1 before'):
        read_samples([first, other])


def test_files_that_cannot_be_used_are_named(tmp_path):
    good = write(tmp_path / "good.jsonl", {"problem": "p", "n": 4, "c": 1})
    judged = write(tmp_path / "judged.jsonl", {"problem": "q", "correct": True})
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"problem": "p", "n": 4, "c": 1}\n' * 5000)[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.gz, after line \d+: damaged or truncated gzip"):
        read_samples([cut])
    with pytest.raises(UserError, match=r"missing.jsonl: No such file"):
        read_samples([tmp_path / "missing.jsonl"])
    with pytest.raises(UserError, match=r": Is a directory"):
        read_samples([tmp_path])
    with pytest.raises(UserError, match=r"good.jsonl is given twice"):
        read_samples([good, tmp_path / "." / "good.jsonl"])
    with pytest.raises(UserError, match=r"judged.jsonl holds samples, the files before it counts"):
        read_samples([good, judged])
    with pytest.raises(UserError, match="no files"):
        read_samples([])


def test_options_that_the_format_has_no_use_for_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "p", "n": 4, "c": 1})
    for options, message in (
        ({"filter": "strict-match"}, "only logs of lm-evaluation-harness have filters"),
        ({"metric": "acc"}, "one verdict per sample"),
        ({"votes": True}, "votes need each sample's answer or score"),
        ({"format": "samples"}, 'line 1: there is no key "correct"'),
    ):
        with pytest.raises(UserError, match=message):
            read_samples([path], **options)


def test_a_constant_that_json_lacks_does_no_harm_where_nobody_looks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(harness_row(0, 1.0, metrics=["exact_match"]) | {"entropy": float("inf")}) + "\n")
    assert "Infinity" in path.read_text()
    assert list(counts(read_samples([path])).values()) == [(1, 1)]


def test_too_few_samples_and_missing_problems_are_named(tmp_path):
    first = read_samples([write(tmp_path / "a.jsonl", {"problem": "p", "n": 4, "c": 1}, {"problem": "q", "n": 2, "c": 1})])
    second = read_samples([write(tmp_path / "b.jsonl", {"problem": "q", "n": 4, "c": 1}, {"problem": "p", "n": 4, "c": 1})])
    third = read_samples([write(tmp_path / "c.jsonl", {"problem": "p", "n": 4, "c": 1})])
    with pytest.raises(UserError, match=r'problem "q" has 2 samples, fewer than k = 4 \(so have 1 of 2 problems\)'):
        first.require(4)
    assert first.aligned_with(second).tolist() == [1, 0]
    with pytest.raises(UserError, match=r'only the first model has "q" \(1 in all\)'):
        first.aligned_with(third)
    with pytest.raises(UserError, match=r'only the second model has "q"'):
        third.aligned_with(first)


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K solutions are not at hand")
def test_solutions_of_real_models_give_the_counts_of_their_verdicts(tmp_path):
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    rows, solved = [], 0
    for i, line in enumerate(GSM8K.read_text().splitlines()):
        for model in models:
            judged = json.loads(line)[model]
            answer = judged["solution"].rpartition("A: ")[2].strip() or None
            rows.append({"problem": i, "correct": judged["is_correct"], "answer": answer})
            solved += judged["is_correct"]
    read = read_samples([write(tmp_path / "gsm8k.jsonl", *rows)], votes=True)
    assert (len(read.problems), set(read.samples.tolist()), int(read.correct.sum())) == (1319, {4}, solved)
    assert read.ballots.answers[0] == ["26", "224", "4", "18"]
