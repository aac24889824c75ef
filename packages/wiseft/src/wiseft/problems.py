"""The problems a model is sampled on: a JSONL file with an id, a prompt and a reference answer on each line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import UserError

FORMATS = (
    ("problem", "prompt", "answer"),
    ("problem", "question", "answer"),
    ("unique_id", "problem", "answer"),  # MATH-500
    ("id", "problem", "answer"),  # AIME
    (None, "prompt", "answer"),
    (None, "question", "answer"),  # GSM8K
)
"""The keys of id, prompt and answer, in the order they are tried; None: the line number (from 1) is the id."""


@dataclass(frozen=True)
class Problem:
    """`answer` is the reference as the file has it; the verifier reads it (`wiseft.verifiers`)."""

    id: str
    prompt: str
    answer: str


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems (default: all) of a JSONL file whose lines have the keys of one of `FORMATS`.

    Ids and answers may be numbers. Other keys and blank lines are ignored.

    >>> path = Path(tempfile.mkdtemp()) / "problems.jsonl"
    >>> _ = path.write_text('{"question": "What is 2 + 3?", "answer": "2 + 3 = 5 #### 5"}')
    >>> read_problems(path)
    [Problem(id='1', prompt='What is 2 + 3?', answer='2 + 3 = 5 #### 5')]

    Raises: `UserError` naming file and line for a line that is not such an object and for an id seen before, and naming
    the file if it cannot be read or has no problems.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    first_seen: dict[str, int] = {}
    problems: list[Problem] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(problems) == limit:
            break
        if not line.strip():
            continue
        problem = _parse(line, number, f"{path}, line {number}")
        if problem.id in first_seen:
            raise UserError(f"{path}, line {number}: problem {problem.id!r} is on line {first_seen[problem.id]} already")
        first_seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} has no problems: write one JSON object a line, with problem, prompt and answer")
    return problems


def _parse(line: str, number: int, where: str) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"{where}: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for id_key, prompt_key, answer_key in FORMATS:
        if all(key is None or key in record for key in (id_key, prompt_key, answer_key)):
            return Problem(
                id=str(number) if id_key is None else _text(record, id_key, where),
                prompt=_text(record, prompt_key, where),
                answer=_text(record, answer_key, where),
            )
    raise UserError(f"{where}: needs the keys problem, prompt and answer; it has {', '.join(record) or 'none'}")


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: {key} must be text or a number, and not empty; it is {json.dumps(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no tokenizer reads
        raise UserError(f"{where}: {key} is not Unicode text; it is {json.dumps(value)}") from None
    return text
