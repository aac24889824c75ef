"""Problems are read from the formats people have, and a bad line is refused by its number."""

import json

import pytest

from lmcore.errors import UserError
from wiseft.problems import Problem, read_problems


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"problem": "1", "prompt": "2+3", "answer": "5"},
        {"problem": 1, "question": "2+3", "answer": 5},
        {"unique_id": "1", "problem": "2+3", "answer": "5", "solution": "ignored"},
        {"id": 1, "problem": "2+3", "answer": "5"},
        {"prompt": "2+3", "answer": "5"},
        {"question": "2+3", "answer": "5"},
    ],
    ids=lambda line: " ".join(line),
)
def test_each_format_gives_the_same_problem(tmp_path, line):
    assert read_problems(write(tmp_path, line)) == [Problem("1", "2+3", "5")]


def test_blank_lines_count_for_line_numbers_only(tmp_path):
    line = {"question": "2+3", "answer": "5"}
    assert [problem.id for problem in read_problems(write(tmp_path, line, "", line, ""))] == ["1", "3"]


def test_the_mark_that_some_editors_put_first_is_no_part_of_the_problem(tmp_path):
    path = write(tmp_path, "\ufeff" + json.dumps({"question": "2+3", "answer": "5"}))
    assert read_problems(path) == [Problem("1", "2+3", "5")]


def test_the_limit_takes_the_first_and_reads_no_further(tmp_path):
    path = write(tmp_path, {"question": "2+3", "answer": "5"}, "not read")
    assert len(read_problems(path, limit=1)) == 1
    with pytest.raises(UserError, match="limit is 0"):
        read_problems(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "2", "prompt"', r"not JSON \(.* at column 26\)"),
        ([1], "expected a JSON object, found list"),
        ({"problem": "2", "prompt": "2+3"}, "needs the keys problem, prompt and answer; it has problem, prompt"),
        ({"problem": "2", "prompt": "2+3", "answer": None}, "answer must be text or a number, and not empty; it is null"),
        ({"problem": "2", "prompt": " ", "answer": "5"}, "prompt must be text"),
        ({"problem": True, "prompt": "2+3", "answer": "5"}, "problem must be text"),
        ('{"problem": "2", "prompt": "\\ud800", "answer": "5"}', r'prompt is not Unicode text; it is "\\ud800"'),
        ("[" * 100_000, "maximum recursion depth"),
        ('{"problem": "2", "prompt": "2+3", "answer": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ({"problem": 1, "prompt": "2+3", "answer": "5"}, "problem '1' is on line 1 already"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, {"problem": "1", "prompt": "2+3", "answer": "5"}, line)
    with pytest.raises(UserError, match=rf"problems.jsonl, line 2: {message}"):
        read_problems(path)


def test_a_file_without_problems_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no problems"):
        read_problems(write(tmp_path, ""))
    with pytest.raises(UserError, match=r"missing.jsonl cannot be read"):
        read_problems(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(UserError, match=r"latin.jsonl cannot be read"):
        read_problems(tmp_path / "latin.jsonl")
