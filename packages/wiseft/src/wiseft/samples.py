"""Judged samples read from files: how many of each problem's samples are correct and, where votes are wanted, what they say."""

import gzip
import io
import json
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jaxtyping import Int
from tqdm import tqdm

from lmcore.errors import UserError
from wiseft import formats
from wiseft.formats import Format, Reader, Record, RowError, Rows

_BLOCK_BYTES = 1 << 17  # lines are parsed and checked by the block, which stays in the cache


@dataclass(frozen=True)
class Ballots:
    """Per problem and sample: the final answer (None if there is none), the score (None if there is none) and the verdict."""

    answers: list[list[str | None]]
    scores: list[list[float | None]]
    verdicts: list[list[bool]]


@dataclass(frozen=True)
class Samples:
    """Problems in order of first appearance, with how many samples each has and how many of them are correct."""

    problems: list[str]
    samples: Int[np.ndarray, " problems"]
    correct: Int[np.ndarray, " problems"]
    ballots: Ballots | None

    def require(self, k: int) -> None:
        """Raise `UserError` naming a problem with fewer than k samples."""
        short = np.flatnonzero(self.samples < k)
        if len(short):
            raise UserError(
                f'problem "{self.problems[short[0]]}" has {self.samples[short[0]]} samples, fewer than k = {k} '
                f"(so have {len(short)} of {len(self.problems)} problems): choose a smaller --k or draw more samples"
            )

    def aligned_with(self, other: "Samples") -> Int[np.ndarray, " problems"]:
        """Where each problem of `other` stands here. Raises `UserError` naming problems that only one of the two has."""
        place = {problem: i for i, problem in enumerate(self.problems)}
        theirs = set(other.problems)
        for missing, where in (
            ([p for p in self.problems if p not in theirs], "only the first model has"),
            ([p for p in other.problems if p not in place], "only the second model has"),
        ):
            if missing:
                named = ", ".join(f'"{problem}"' for problem in missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise UserError(f"a paired comparison needs the same problems: {where} {named} ({len(missing)} in all)")
        return np.array([place[problem] for problem in other.problems], dtype=np.int64)


def read_samples(
    paths: Sequence[Path],
    *,
    format: Format | None = None,
    filter: str | None = None,
    metric: str | None = None,
    votes: bool = False,
) -> Samples:
    """Read JSON-lines files of one model, plain or gzipped, and add up the samples of each problem over all of them.

    The format is told from the first record of each file (`formats`) unless given, and must be the same in all. Memory holds two
    counts per problem; with `votes` also the answer, score and verdict of every sample. A row of counts that repeats a problem
    with the same numbers counts once, with a warning.

    Raises: `UserError` naming file and line for what is not JSON, lacks a key, holds a value that makes no sense or
    contradicts another row; naming the file if it is missing, empty, truncated or given twice.
    """
    tally, reader = _Tally(votes), None
    for i, path in enumerate(paths):
        if path.resolve() in map(Path.resolve, paths[:i]):
            raise UserError(f"{path} is given twice: its samples would count twice")
        told = format
        for numbers, records in _records(path):
            if told is None:
                told = _detect(path, numbers[0], records[0])
            if reader is None:
                reader, read_format = formats.reader(told, filter=filter, metric=metric, votes=votes), told
            if told != read_format:
                raise UserError(f"{path} holds {told}, the files before it {read_format}: give files of one format")
            tally.add(path, numbers, _rows(path, numbers, records, reader), one_row_each=told == "counts")
    if reader is None:
        raise UserError("no files to read")
    reader.finish()
    if not tally.place:
        raise UserError(f"{paths[0]} holds no samples")
    return tally.samples()


class _Tally:
    """Sums by problem over blocks of rows."""

    def __init__(self, votes: bool):
        self.place: dict[str, int] = defaultdict(count().__next__)
        self.counts = np.zeros((2, 1024), dtype=np.int64)  # samples and correct of each place, doubled when full
        self.ballots = Ballots([], [], []) if votes else None
        self.equal_answers: dict[str | None, str | None] = {}
        self.repeats = 0

    def add(self, path: Path, numbers: Sequence[int], rows: Rows, *, one_row_each: bool) -> None:
        """Add rows. With `one_row_each`, a second row for a problem must say the same as the first and is left out."""
        known = len(self.place)
        places = np.fromiter(map(self.place.__getitem__, rows.problems), dtype=np.int64, count=len(rows.problems))
        while len(self.place) > self.counts.shape[1]:
            self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)], axis=1)
        if one_row_each and len(self.place) - known < len(places):
            self._add_first_rows(path, numbers, places, rows)
            return
        np.add.at(self.counts[0], places, rows.samples)
        np.add.at(self.counts[1], places, rows.correct)
        if self.ballots is not None:
            self._add_ballots(self.ballots, places, rows)

    def samples(self) -> Samples:
        """Everything added so far."""
        if self.repeats:
            warnings.warn(f"{self.repeats} rows repeat a problem with the same counts: each problem counts once", stacklevel=3)
        samples, correct = self.counts[:, : len(self.place)]
        return Samples(list(self.place), samples, correct, self.ballots)

    def _add_first_rows(self, path: Path, numbers: Sequence[int], places: np.ndarray, rows: Rows) -> None:
        for number, place, problem, n, c in zip(numbers, places, rows.problems, rows.samples, rows.correct, strict=True):
            before = self.counts[:, place].tolist()
            if before[0] == 0:
                self.counts[:, place] = n, c
            elif before == [n, c]:
                self.repeats += 1
            else:
                raise UserError(
                    f'{path}, line {number}: problem "{problem}" has n = {n}, c = {c} here and n = {before[0]}, c = {before[1]} '
                    "before: add the two up if they are different samples, rename one if they are different problems"
                )

    def _add_ballots(self, ballots: Ballots, places: np.ndarray, rows: Rows) -> None:
        for _ in range(len(ballots.answers), len(self.place)):
            ballots.answers.append([])
            ballots.scores.append([])
            ballots.verdicts.append([])
        for place, answer, score, correct in zip(places.tolist(), rows.answers, rows.scores, rows.correct, strict=True):
            ballots.answers[place].append(self.equal_answers.setdefault(answer, answer))
            ballots.scores[place].append(score)
            ballots.verdicts[place].append(bool(correct))


def _rows(path: Path, numbers: Sequence[int], records: list[Record], reader: Reader) -> Rows:
    """The rows of a block of records; if it cannot be used, the records are read one by one to name the line."""
    unusable = (RowError, KeyError, TypeError, AttributeError, IndexError)
    try:
        return reader.rows(records)
    except unusable:
        for number, record in zip(numbers, records, strict=True):
            try:
                reader.rows([record])
            except RowError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            except KeyError as error:
                raise UserError(f'{path}, line {number}: there is no key "{error.args[0]}"') from None
            except unusable as error:
                raise UserError(f"{path}, line {number}: not the layout of its format ({error})") from error
        raise


def _detect(path: Path, number: int, record: Record) -> Format:
    try:
        return formats.detect(record)
    except RowError as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def _records(path: Path) -> Iterator[tuple[Sequence[int], list[Record]]]:
    """Blocks of parsed lines with their line numbers, counted from 1; blank lines are left out."""
    empty = True
    for first, lines in _lines(path):
        numbers: Sequence[int] = range(first, first + len(lines))
        try:
            records = list(map(orjson.loads, lines))
        except orjson.JSONDecodeError:
            numbers, records = _records_one_by_one(path, numbers, lines)
        if set(map(type, records)) - {dict}:
            number, record = next((i, r) for i, r in zip(numbers, records, strict=True) if not isinstance(r, dict))
            raise UserError(f"{path}, line {number}: expected a JSON object, got {str(record)[:40]}")
        if records:
            empty = False
            yield numbers, records
    if empty:
        raise UserError(f"{path} is empty")


def _records_one_by_one(path: Path, numbers: Sequence[int], lines: list[bytes]) -> tuple[list[int], list[Any]]:
    """As the standard library reads them: it takes NaN and infinity, which some logs hold where nobody looks at them."""
    kept, records = [], []
    for number, line in zip(numbers, lines, strict=True):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); each line must hold one JSON value") from None
            kept.append(number)
    return kept, records


def _lines(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Blocks of lines with the number of the first."""
    number = 1
    try:
        with (
            open(path, "rb") as raw,
            tqdm(
                total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=1, disable=not raw.seekable()
            ) as bar,
        ):
            compressed = raw.peek(2)[:2] == b"\x1f\x8b"
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if compressed else raw
            while lines := file.readlines(_BLOCK_BYTES):
                yield number, lines
                number += len(lines)
                if raw.seekable():  # a pipe has no position
                    bar.update(raw.tell() - bar.n)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, after line {number - 1}: damaged or truncated gzip ({error}): copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
