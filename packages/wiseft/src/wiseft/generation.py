"""Completions whose randomness is keyed by (seed, problem, sample, position), not by their place in a batch."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcore.errors import UserError
from lmcore.random import uniform
from wiseft.decoding import NUMBERS_PER_TOKEN, Decoding, draw, filtered_log_softmax
from wiseft.problems import Problem

Chat = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Request:
    """One completion to draw: the `sample`-th of a problem, after the tokens of its prompt."""

    problem: str
    sample: int
    prompt: tuple[int, ...]

    @property
    def stream(self) -> str:
        """The name of its random numbers (`lmcore.random`); those from index 32 i on choose its token i."""
        return f"sample {self.problem} {self.sample}"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn, by whatever engine: from which distribution, with which random numbers, and how long at most."""

    decoding: Decoding
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was drawn: text without end token, and the number of tokens with it."""

    text: str
    tokens: int
    ended: bool
    """An end token was drawn; otherwise `max_new_tokens` cut it off."""
    score: float
    """Log-probability (nats, <= 0) of the tokens under the model itself: temperature 1, no filter, end token included."""


def requests_for(
    problems: Iterable[Problem], tokenizer: PreTrainedTokenizerBase, *, n: int, template: str = "{prompt}", chat: Chat = "auto"
) -> list[Request]:
    """Return the requests for n samples of each problem, in their order.

    `template` is the text put to the model, with the prompt in place of `{prompt}`. It becomes the user's turn of the tokenizer's
    chat template where there is one (`chat` "auto") or in any case ("on"); else ("off") plain text with the tokenizer's usual
    special tokens.

    Raises: `UserError` if `template` has no `{prompt}`, if chat is "on" and the tokenizer has no chat template, or naming a
    problem that its chat template refuses or whose prompt has no tokens.
    """
    if "{prompt}" not in template:
        raise UserError(f"the prompt template {template!r} has no {{prompt}}")
    if chat == "on" and not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template: use --chat off")
    requests = []
    for problem in problems:
        text = template.replace("{prompt}", problem.prompt)
        if chat != "off" and tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            try:
                text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                raise UserError(f"problem {problem.id!r}: the chat template fails ({error}): try --chat off") from None
            prompt = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        else:
            prompt = tuple(tokenizer(text).input_ids)
        if not prompt:
            raise UserError(f"problem {problem.id!r}: its prompt {text!r} has no tokens")
        requests += [Request(problem.id, sample, prompt) for sample in range(n)]
    return requests


def batches(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Return batches of at most `batch_size` requests whose prompts have the same number of tokens, the longest first.

    So no row is padded, and a batch that does not fit the memory fails at the start.
    """
    by_length = sorted(requests, key=lambda request: -len(request.prompt))
    return [
        group[start : start + batch_size]
        for group in (list(group) for _, group in groupby(by_length, key=lambda request: len(request.prompt)))
        for start in range(0, len(group), batch_size)
    ]


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], drawing: Drawing
) -> list[Completion]:
    """Draw one batch. The prompts must have equal length (`batches`); each distinct prompt is read once for all its samples.

    Token i of a request is `decoding.draw` from `filtered_log_softmax` with numbers 32 i to 32 i + 31 of the Philox stream of (seed,
    problem, sample): a function of its logits alone, wherever in the batch it stands. In a batch of equal size those differ at
    most by the rounding of matrix products; rows that have ended stay in the batch to keep its size. Two models, or two
    temperatures, sampled with one seed share their random numbers, which narrows the interval of the difference between them.

    Only `decoding` shapes the distribution: penalties and defaults in the model's generation config are not applied, its end
    tokens are. (`model.generate` would apply them before any processor of ours; hence the loop.)

    Raises: `UserError` naming a problem for which the model gives NaN, or whose prompt leaves no room for `max_new_tokens`.
    """
    require_room(model, requests, drawing.max_new_tokens)
    ends = end_tokens(model, tokenizer)
    with torch.inference_mode(), _without_dropout(model):
        tokens, lengths, scores = _generate(model, requests, drawing, ends)
    completions = []
    for row, length, score in zip(tokens.tolist(), lengths.tolist(), scores.tolist(), strict=True):
        ended = row[length - 1] in ends
        text = str(tokenizer.decode(row[: length - ended], skip_special_tokens=True))
        completions.append(Completion(text, length, ended, score))
    return completions


def require_room(model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int) -> None:
    """Raise a `UserError` if the longest prompt and `max_new_tokens` exceed the positions that the model was made for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(requests, key=lambda request: len(request.prompt))
    if positions is not None and len(longest.prompt) + max_new_tokens > positions:
        raise UserError(
            f"problem {longest.problem!r}: {len(longest.prompt)} prompt tokens and {max_new_tokens} new ones exceed the {positions} "
            "positions of the model: lower --max-new-tokens or shorten the prompt"
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a completion: those of the model's generation config and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(ids - {None})


def identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tells this model from another, as JSON: a resumed run must find it unchanged.

    `weights` is a hash of each tensor's name, dtype, shape and the integer sum of its bits: equal on every device, and one pass
    over memory. It notices another checkpoint, not a deliberate forgery.
    """
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]} {_sum_of_bits(tensor)}\n".encode())
    return {
        "engine": "transformers",
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "end_tokens": end_tokens(model, tokenizer),
    }


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum modulo 2^64 of the tensor's bytes taken as int64, plus that of the bytes left over."""
    octets = tensor.reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # a view as int64 must begin at a multiple of 8 bytes
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum() + octets[whole:].sum())


def _generate(
    model: PreTrainedModel, requests: Sequence[Request], drawing: Drawing, ends: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [rows, <= max_new_tokens], and per row how many of them count (int64) and their log-probability (float64)."""
    device = model.device
    end = torch.tensor(ends, dtype=torch.int64, device=device)
    running = torch.ones(len(requests), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(requests), dtype=torch.int64, device=device)
    scores = torch.zeros(len(requests), dtype=torch.float64, device=device)
    tokens: list[Tensor] = []
    for position, logits in enumerate(_logits_along(model, requests, tokens)):
        log_probability = logits.float().log_softmax(-1)
        _refuse_nan(log_probability, requests)
        if position % 64 == 0:
            numbers = _numbers(requests, drawing.seed, position, 64).to(device)
        token = draw(filtered_log_softmax(logits, **asdict(drawing.decoding)), numbers[:, position % 64])
        tokens.append(token)
        lengths += running
        scores += torch.where(running, log_probability.gather(-1, token[:, None])[:, 0].double(), 0.0)
        running &= ~torch.isin(token, end)
        if len(tokens) == drawing.max_new_tokens or not running.any():
            break
    return torch.stack(tokens, dim=1), lengths, scores


def _numbers(requests: Sequence[Request], seed: int, position: int, positions: int) -> Tensor:
    """What the next tokens from `position` on are drawn with: float32 [rows, positions, NUMBERS_PER_TOKEN]."""
    size, start = positions * NUMBERS_PER_TOKEN, position * NUMBERS_PER_TOKEN
    numbers = [uniform(seed, request.stream, size, start=start) for request in requests]
    return torch.stack(numbers).unflatten(-1, (positions, NUMBERS_PER_TOKEN))


def _logits_along(model: PreTrainedModel, requests: Sequence[Request], tokens: list[Tensor]) -> Iterator[Tensor]:
    """The logits [rows, vocabulary] after the prompts, then after each token [rows] that the caller appends to `tokens`."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    row = torch.tensor([place[request.prompt] for request in requests], device=model.device)
    # Without this a long prompt would be multiplied with the whole vocabulary at every position.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(torch.tensor(prompts, device=model.device), use_cache=True, **last_only)
    cache = output.past_key_values
    cache.batch_select_indices(row)
    yield output.logits[:, -1].to(model.device)[row]
    while True:
        yield model(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1].to(model.device)


def _refuse_nan(log_probability: Tensor, requests: Sequence[Request]) -> None:
    damaged = log_probability[:, 0].isnan()  # one NaN logit makes NaN of its whole row
    if damaged.any():
        problem = requests[int(damaged.nonzero()[0])].problem
        raise UserError(f"problem {problem!r}: the model gives NaN; check its weights, or its dtype for overflow")


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
