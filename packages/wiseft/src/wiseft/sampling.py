"""Judged samples of a model, in a file that a killed run continues to the same bytes: the work of `wiseft sample`."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lmcore.errors import UserError
from wiseft import generation, vllm_generation
from wiseft.decoding import Decoding
from wiseft.generation import Chat, Completion, Drawing, Request, requests_for
from wiseft.problems import Problem
from wiseft.resumable import continued
from wiseft.verifiers import Verdict, gsm8k, require_readable

Verifier = Callable[[str, str], Verdict]


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    n: int,
    out: Path,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    verifier: Verifier = gsm8k,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    template: str = "{prompt}",
    chat: Chat = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw n completions of each problem, judge them, and write `out/samples.jsonl`, which `wiseft passk` reads.

    A line is one sample: `problem`, `sample` (from 0), `correct` and `answer` (see `verifiers`), `score`, `tokens` and `ended` (see
    `generation.Completion`; the score is the model's own likelihood, which `passk --best` ranks by), `gave_up` where the verifier did, and
    `completion`. The longest prompts come first. `out/run.json` holds the configuration, the identity of the model and the
    environment of the first start.

    The file grows by whole batches. The same call continues a run that was killed, to the bytes it would have had on this
    machine with as many threads (a verifier's timeouts aside); another number of threads rounds differently, which shows in the
    last digit of scores and, rarely, in a token. A complete run is left as it is. A run with another configuration is refused, or, with
    `overwrite`, replaced. `model` is a `transformers` model or a `vllm.LLM`; of the latter see `vllm_generation` for what holds.

    Returns the counts over the whole file: `problems`, `samples`, `correct` and `ended` (fractions of the samples), `gave_up`
    and `tokens` (numbers); and `tokens_per_second` of this call, None if it drew nothing.
    Raises: `UserError` for settings out of range, a reference the verifier cannot read (naming the problem), another configuration
    in `out` (naming what differs), and a file that is not what this run wrote (naming the line).
    """
    _require_at_least_one(n=n, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}: it must be in [0, 2^64)")
    references = {problem.id: problem.answer for problem in problems}
    require_readable(problems, verifier)
    engine = vllm_generation if type(model).__module__.partition(".")[0] == "vllm" else generation
    requests = requests_for(problems, tokenizer, n=n, template=template, chat=chat)
    config = {
        **engine.identity(model, tokenizer),
        **asdict(decoding),
        "problems": _digest([[request.problem, request.prompt, references[request.problem]] for request in requests[::n]]),
        "template": template,
        "chat": chat,
        "n": n,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "verifier": verifier.__qualname__,
    }
    plan = engine.batches(requests, batch_size)
    drawing = Drawing(decoding=decoding, seed=seed, max_new_tokens=max_new_tokens)
    drawn, seconds = 0, 0.0
    with continued(out / "samples.jsonl", config, overwrite=overwrite) as file:
        done = _keep_whole_batches(file, plan, out / "samples.jsonl")
        for batch in tqdm(plan[done:], desc="sample", unit="batch", initial=done, total=len(plan), disable=None):
            start = time.perf_counter()
            completions = engine.complete(model, tokenizer, batch, drawing)
            drawn, seconds = drawn + sum(c.tokens for c in completions), seconds + time.perf_counter() - start
            verdicts = [verifier(c.text, references[r.problem]) for r, c in zip(batch, completions, strict=True)]
            file.write(b"".join(map(_line, batch, completions, verdicts)))
            file.flush()
            os.fsync(file.fileno())
        return _summary(file) | {"tokens_per_second": drawn / seconds if drawn else None}


def _line(request: Request, completion: Completion, verdict: Verdict) -> bytes:
    record: dict[str, Any] = {
        "problem": request.problem,
        "sample": request.sample,
        "correct": verdict.correct,
        "answer": verdict.answer,
        "score": round(completion.score, 4),
        "tokens": completion.tokens,
        "ended": completion.ended,
    }
    if verdict.gave_up:
        record["gave_up"] = True
    return json.dumps(record | {"completion": completion.text}, ensure_ascii=False).encode() + b"\n"


def _require_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _keep_whole_batches(file: BinaryIO, plan: list[list[Request]], path: Path) -> int:
    """Cut off what a killed run left of an unfinished batch; return the number of whole ones. Leaves `file` at its end."""
    number, end = 0, 0
    for done, batch in enumerate(plan):
        for request in batch:
            line = file.readline()
            if not line.endswith(b"\n"):
                file.truncate(end)
                file.seek(end)
                return done
            number += 1
            if not _is_sample_of(request, line):
                raise UserError(f"{path}, line {number} is not what this run wrote: delete the file to start anew")
        end = file.tell()
    if file.readline():
        raise UserError(f"{path}, line {number + 1}: the run has {number} samples, delete the file to start anew")
    return len(plan)


def _is_sample_of(request: Request, line: bytes) -> bool:
    try:
        record = json.loads(line)
        return (record["problem"], record["sample"]) == (request.problem, request.sample)
    except (ValueError, KeyError, TypeError):
        return False


def _summary(file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    records = [json.loads(line) for line in file]
    return {
        "problems": len({record["problem"] for record in records}),
        "samples": len(records),
        "correct": sum(record["correct"] for record in records) / len(records),
        "ended": sum(record["ended"] for record in records) / len(records),
        "gave_up": sum("gave_up" in record for record in records),
        "tokens": sum(record["tokens"] for record in records),
    }
