"""How many samples of each candidate are correct on each problem, drawn when asked for and kept in a file."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcore.errors import UserError
from lmcore.models import load_causal_lm
from wiseft.decoding import Decoding
from wiseft.generation import Chat, Drawing, batches, complete, requests_for
from wiseft.interpolate import interpolate_
from wiseft.problems import Problem
from wiseft.verifiers import Verdict


@dataclass(frozen=True)
class Candidate:
    """The weights `delta * EARLY + (1 - delta) * LATE`, sampled at a temperature; `early` is the label of EARLY, None for LATE alone."""

    early: str | None
    delta: float
    temperature: float

    @property
    def name(self) -> str:
        """For people, and for the ledger."""
        weights = "LATE alone" if self.early is None else f"{self.early}, delta {self.delta}"
        return f"{weights}, T {self.temperature}"


def labelled(early: Sequence[str | Path]) -> dict[str, str | Path]:
    """The early checkpoints by the shortest names that tell them apart. Raises: `UserError` if there is none, or one twice."""
    if not early:
        raise UserError("no early checkpoint is given: pass at least one with --early")
    full = [str(Path(source)) for source in early]
    if len(set(full)) < len(full):
        raise UserError(f"an early checkpoint is given twice: {', '.join(full)}")
    short = [Path(source).name for source in early]
    return dict(zip(short if len(set(short)) == len(short) else full, early, strict=True))


def candidates_of(labels: Iterable[str], delta: Sequence[float], temperature: Sequence[float]) -> list[Candidate]:
    """LATE alone and every interpolation, each at every temperature; those of the same weights stand together.

    >>> [candidate.name for candidate in candidates_of(["step-100"], delta=[0.5], temperature=[1.0])]
    ['LATE alone, T 1.0', 'step-100, delta 0.5, T 1.0']

    Raises: `UserError` if there are fewer than two.
    """
    weights = [(None, 0.0), *((label, d) for label in labels for d in delta if d != 0)]
    candidates = list(dict.fromkeys(Candidate(label, float(d), float(t)) for label, d in weights for t in temperature))
    if len(candidates) < 2:
        raise UserError(f"--delta {[*delta]} and --temperature {[*temperature]} make {len(candidates)} candidates: give more")
    return candidates


@dataclass(frozen=True)
class Count:
    """How many of n samples are correct, how many `max_new_tokens` cut off, and how many tokens they took together."""

    correct: int
    cut_off: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn and judged, whatever the candidate; see `wiseft.sampling.sample`."""

    n: int
    top_k: int | None
    top_p: float | None
    min_p: float | None
    max_new_tokens: int
    batch_size: int
    template: str
    chat: Chat
    verifier: Callable[[str, str], Verdict]
    seed: int

    def count(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: Problem, temperature: float) -> Count:
        """Draw and judge n samples of a problem; each is keyed by (seed, problem, sample), the same for all candidates."""
        decoding = Decoding(temperature=temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        drawing = Drawing(decoding=decoding, seed=self.seed, max_new_tokens=self.max_new_tokens)
        requests = requests_for([problem], tokenizer, n=self.n, template=self.template, chat=self.chat)
        drawn = [c for batch in batches(requests, self.batch_size) for c in complete(model, tokenizer, batch, drawing)]
        correct = sum(self.verifier(completion.text, problem.answer).correct for completion in drawn)
        cut_off = sum(not completion.ended for completion in drawn)
        return Count(correct, cut_off, sum(completion.tokens for completion in drawn))

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values; the verifier by its name."""
        return {**asdict(self), "verifier": self.verifier.__qualname__}


class LiveModel:
    """The one model in memory, whose weights move along the segments from LATE to each EARLY."""

    def __init__(self, late: str | Path, early: Mapping[str, str | Path], *, dtype: torch.dtype | None, device: str):
        self.model, self.tokenizer = load_causal_lm(late, dtype=dtype, device=device)
        self._late, self._early = late, early
        self._at: tuple[str | None, float] = (None, 0.0)

    def at(self, early: str | None, delta: float) -> PreTrainedModel:
        """The model with the weights `delta * EARLY + (1 - delta) * LATE`, set in place unless they are there already."""
        if (early, delta) != self._at:
            interpolate_(self.model, self._late if early is None else self._early[early], self._late, delta)
            self._at = (early, delta)
        return self.model


class Ledger:
    """Counts by (candidate, problem), in memory and in a file of one JSON line each, where a killed run finds them again."""

    def __init__(self, file: BinaryIO):
        """Read what is there, and cut off a line that a killed run left unfinished."""
        self._file = file
        self._counts: dict[tuple[str, str], Count] = {}
        end = 0
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                end += len(line)
                self._read(line, number)
        file.truncate(end)
        file.seek(end)

    def get(self, candidate: Candidate, problem: Problem) -> Count | None:
        """What is known, if anything is."""
        return self._counts.get((candidate.name, problem.id))

    def add(self, candidate: Candidate, problem: Problem, count: Count) -> None:
        """Keep a count; when this returns, it is on the disk."""
        line = {"candidate": candidate.name, "problem": problem.id, **asdict(count)}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._counts[candidate.name, problem.id] = count

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            count = Count(record["correct"], record["cut_off"], record["tokens"])
            self._counts[record["candidate"], record["problem"]] = count
        except (ValueError, KeyError, TypeError):
            where = f"{self._file.name}, line {number}"
            raise UserError(f"{where} is not what this run wrote: delete the file to start anew") from None
