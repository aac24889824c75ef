"""The files that hold judged samples: how each format is told from the others, and what its rows say."""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lmcore.errors import UserError

Format = Literal["counts", "samples", "lm-eval", "evalplus", "human-eval"]
Record = dict[str, Any]

_MOST_SAMPLES = 1_000_000  # of a problem; memory and time of the estimates grow with it


class RowError(Exception):
    """A row that cannot be used; whoever knows the file and the line adds them."""


@dataclass
class Rows:
    """Rows as columns: so many samples of a problem, so many of them correct; where votes are wanted, answers and scores."""

    problems: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)

    def add(self, problem: str, verdicts: Sequence[Any], answers: Sequence[str | None]) -> None:
        """Append judged samples of one problem."""
        self.problems += [problem] * len(verdicts)
        self.samples += [1] * len(verdicts)
        self.correct += _verdicts(verdicts)
        self.answers += answers
        self.scores += [None] * len(verdicts)


class Reader:
    """What understands one format."""

    def rows(self, records: Sequence[Record]) -> Rows:
        """The rows of several records. Raises `RowError` (about the first, if there is one), or `KeyError` for a missing key."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called after the last record; raises `UserError` for what only shows then."""


class CountsReader(Reader):
    """`{"problem", "n", "c"}`: one row per problem."""

    def rows(self, records: Sequence[Record]) -> Rows:
        """See `Reader.rows`."""
        samples, correct = [record["n"] for record in records], [record["c"] for record in records]
        if set(map(type, samples)) != {int} or min(samples) < 1 or max(samples) > _MOST_SAMPLES:
            raise RowError(f'"n" is {samples[0]!r}: it must be an integer from 1 to {_MOST_SAMPLES:,}')
        if set(map(type, correct)) != {int} or min(correct) < 0:
            raise RowError(f'"c" is {correct[0]!r}: it must be an integer of at least 0')
        if any(map(operator.gt, correct, samples)):
            raise RowError(f"c = {correct[0]} correct of n = {samples[0]} samples")
        return Rows(_names([record["problem"] for record in records]), samples, correct)


class SamplesReader(Reader):
    """`{"problem", "correct", "answer", "score"}`: one row per sample; the last two may be absent."""

    keys = ("problem", "correct")

    def __init__(self, votes: bool):
        self.votes = votes

    def rows(self, records: Sequence[Record]) -> Rows:
        """See `Reader.rows`."""
        problem, verdict = self.keys
        correct = _verdicts([record[verdict] for record in records])
        found = Rows(_names([record[problem] for record in records]), [1] * len(records), correct)
        if self.votes:
            found.answers = [_answer(record.get("answer")) for record in records]
            found.scores = [_score(record.get("score")) for record in records]
        return found


class HumanEvalReader(SamplesReader):
    """`*_results.jsonl` of human-eval: `{"task_id", "completion", "passed", ...}`, one row per sample."""

    keys = ("task_id", "passed")


class EvalPlusReader(Reader):
    """`*_eval_results.json` of evalplus: `{"eval": {task: [{"base_status", "plus_status", ...}, ...]}}`.

    A sample is correct if it passes the base tests and, where they were run, the extra ones; the metric `base` asks for the
    base tests alone.
    """

    def __init__(self, metric: str | None):
        if metric not in (None, "base", "plus"):
            raise UserError(f"--metric {metric}: evalplus results have the metrics base and plus")
        self.metric = metric

    def rows(self, records: Sequence[Record]) -> Rows:
        """See `Reader.rows`."""
        found = Rows()
        for task, samples in (item for record in records for item in record["eval"].items()):
            if not isinstance(samples, list):
                raise RowError(f'task "{task}" is in the layout of an early evalplus: evaluate its samples with a recent one')
            found.add(task, [self._passes(sample) for sample in samples], [None] * len(samples))
        return found

    def _passes(self, sample: Record) -> bool:
        base, plus = sample["base_status"] == "pass", sample["plus_status"]
        if self.metric == "base" or (plus is None and self.metric is None):
            return base
        if plus is None:
            raise RowError("the extra tests were not run: choose --metric base")
        return base and plus == "pass"


class LmEvalReader(Reader):
    """`samples_*.jsonl` of lm-evaluation-harness: a row per document and filter, `{"doc_id", "filter", "resps", ..., metric: value}`.

    A row is one sample where the document was run once, so samples come from several files, one per seed. With `repeats` in
    the task, a row holds them all if its metric is a list of verdicts or is pass@1, their mean; any other metric judged one
    answer distilled from them, which says nothing about Pass@k. A problem is a `doc_id` with its `doc_hash`, since tasks number
    their documents alike.
    """

    _BOOKKEEPING = frozenset(
        ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")
    )  # fmt: skip
    _MEAN = re.compile(r"pass(@|_at_)1")
    _NOT_A_VERDICT = re.compile(r"pass(@|_at_)(?!1$)\d+")
    _NO_ANSWER = "[invalid]"  # what the harness's regex filters put where nothing matches

    def __init__(self, filter: str | None, metric: str | None, votes: bool):
        self.filter, self.metric, self.votes = filter, metric, votes
        self.filters: set[str] = set()

    def rows(self, records: Sequence[Record]) -> Rows:
        """See `Reader.rows`."""
        found = Rows()
        for record in records:
            name = record.get("filter", "none")
            self.filters.add(name)
            if self.filter in (None, name):
                self._add(found, record)
        return found

    def finish(self) -> None:
        """Raise `UserError` where there are several filters and none was chosen, or not the chosen one."""
        choices = ", ".join(sorted(self.filters))
        if self.filter is None and len(self.filters) > 1:
            raise UserError(f"every document was judged under the filters {choices}: choose one with --filter")
        if self.filter is not None and self.filter not in self.filters:
            raise UserError(f"--filter {self.filter}: the files hold {choices}")

    def _add(self, found: Rows, record: Record) -> None:
        metric = self.metric or self._only_metric(record)
        value = record[metric]
        problem = str(record["doc_id"]) + ("#" + record["doc_hash"][:8] if "doc_hash" in record else "")
        requests, answers = record.get("resps", [[None]]), record.get("filtered_resps", [None])
        repeats = len(requests[0]) if isinstance(requests[0], list) else 1
        if len(answers) == 1 and isinstance(answers[0], list):  # all repeats, where the filter kept them
            answers = answers[0]
        if isinstance(value, list) or repeats == 1:
            verdicts = value if isinstance(value, list) else [value]
            found.add(problem, verdicts, self._answers(answers, len(verdicts)))
        elif self._MEAN.fullmatch(metric) and not self.votes:
            correct = value * repeats
            if not (repeats and -1e-6 <= correct <= repeats + 1e-6 and abs(correct - round(correct)) <= 1e-6):
                raise RowError(f'"{metric}" is {value!r}, which is no mean of {repeats} verdicts')
            found.problems.append(problem)
            found.samples.append(repeats)
            found.correct.append(round(correct))
        else:
            raise RowError(
                f'"{metric}" is one number for {repeats} repeats, so it does not say which are correct: '
                "run the task once per seed without repeats and give all the files"
            )

    def _only_metric(self, record: Record) -> str:
        names = record.get("metrics") or [
            key
            for key, value in record.items()
            if key not in self._BOOKKEEPING and isinstance(value, bool | int | float | list)
        ]
        names = [name for name in names if not self._NOT_A_VERDICT.fullmatch(name)]
        if len(names) != 1:
            raise RowError(f"the metrics are {', '.join(names) or 'absent'}: choose one with --metric")
        return names[0]

    def _answers(self, given: Sequence[Any], wanted: int) -> list[str | None]:
        if not self.votes or len(given) != wanted:
            return [None] * wanted
        return [None if answer == self._NO_ANSWER else _answer(answer) for answer in given]


def detect(record: Record) -> Format:
    """The format whose keys the first record of a file has. Raises: `RowError` naming the keys where it is none."""
    if "doc_id" in record:
        return "lm-eval"
    if isinstance(record.get("eval"), dict):
        return "evalplus"
    if "task_id" in record and "passed" in record:
        return "human-eval"
    if "n" in record or "c" in record:
        return "counts"
    if "correct" in record:
        return "samples"
    raise RowError(
        f"the keys {', '.join(record) or '(none)'} are those of no known format: "
        f"expected {{problem, n, c}}, {{problem, correct}} or the logs of lm-eval, evalplus or human-eval"
    )


def reader(format: Format, *, filter: str | None, metric: str | None, votes: bool) -> Reader:
    """What reads `format`. Raises: `UserError` for options that the format has no use for."""
    if filter is not None and format != "lm-eval":
        raise UserError(f"--filter {filter}: only logs of lm-evaluation-harness have filters, these files hold {format}")
    if metric is not None and format not in ("lm-eval", "evalplus"):
        raise UserError(f"--metric {metric}: these files hold {format}, which has one verdict per sample")
    if votes and format in ("counts", "evalplus", "human-eval"):
        raise UserError(f"votes need each sample's answer or score, and these files hold {format}, which has neither")
    match format:
        case "counts":
            return CountsReader()
        case "samples":
            return SamplesReader(votes)
        case "human-eval":
            return HumanEvalReader(votes)
        case "evalplus":
            return EvalPlusReader(metric)
        case "lm-eval":
            return LmEvalReader(filter, metric, votes)


def _names(values: list[Any]) -> list[str]:
    kinds = set(map(type, values))
    if kinds == {str}:
        return values
    if not kinds <= {str, int}:
        raise RowError(f"the name of the problem is {values[0]!r}: it must be a string or an integer")
    return list(map(str, values))


def _verdicts(values: Sequence[Any]) -> list[int]:
    if not set(map(type, values)) <= {bool, int, float} or not set(values) <= {0, 1}:
        raise RowError(f"the verdict is {values[0] if len(values) == 1 else values!r}: it must be true or false, 1 or 0")
    return list(map(int, values))


def _answer(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | dict):
        raise RowError(f"the answer is {value!r}: it must be a string, a number or null")
    return str(value)


def _score(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or math.isnan(value):
        raise RowError(f"the score is {value!r}: it must be a number")
    return float(value)
