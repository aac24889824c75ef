"""Texts that a model writes freely, from nothing but its start token, in a file that a killed run continues to the same bytes."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcore.errors import UserError
from lmcore.random import uniform
from lmcore.record import Run

_NUMBERS = 32  # random numbers for a token: enough for vocabularies of up to 2^32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How texts are drawn. Raises: `UserError` naming the setting that is out of range."""

    samples: int = 256
    """Number of texts."""
    max_tokens: int = 256
    """A text is cut off after so many tokens."""
    temperature: float = 1.0
    """Divides the logits; 1 is the model's own distribution."""
    top_p: float = 1.0
    """Keeps the most probable tokens that make up this probability (Holtzman et al. 2020)."""
    batch_size: int = 32
    """Texts drawn together."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("samples", 1, 2**63), ("max_tokens", 1, 2**31), ("batch_size", 1, 2**31), ("seed", 0, 2**64 - 1),
            ("temperature", 1e-3, 1e3), ("top_p", 1e-6, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} is {getattr(self, name)}: it must be between {low} and {high}")


@dataclass(frozen=True)
class FreeText:
    """What was drawn: the text without start and end token, and the number of tokens with the end token."""

    text: str
    tokens: int
    ended: bool
    """The model ended it; otherwise `max_tokens` cut it off."""


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, sampling: Sampling = Sampling()
) -> list[FreeText]:  # fmt: skip
    """Draw texts into `out/texts.jsonl`, a line for each (`index`, `tokens`, `ended`, `text`), and return them.

    Text i depends on the model, the seed and i: not on how many are drawn, nor, but where rounding tips the choice of a token, on the batch
    size. The file grows by whole batches. The same call continues a run that was killed, to the bytes it would have had on this machine
    with as many threads; a finished one is left as it is. `out` also holds the options, the model's identity and the environment
    (`lmcore.record.Run`).

    Raises: `UserError` if `out` holds another run or is being written by another process, if the file is not what this run wrote (naming
    the line), if the model has fewer positions than `max_tokens`, has no start token, or gives NaN (naming the text).
    """
    start = start_token(model, tokenizer)
    _require_room(model, sampling)
    indices = range(sampling.samples)
    plan = [indices[i : i + sampling.batch_size] for i in range(0, sampling.samples, sampling.batch_size)]
    config = asdict(sampling) | {"model": _identity(model), "start": start, "ends": _end_tokens(model, tokenizer)}
    with _appending(out, config) as file:
        drawn = _kept(file, plan, out / "texts.jsonl")
        with tqdm(desc="sample", unit="text", initial=len(drawn), total=sampling.samples, disable=None) as bar:
            for batch in plan[-(-len(drawn) // sampling.batch_size) :]:
                texts = draw_texts(model, tokenizer, batch, sampling)
                file.write(b"".join(map(_line, batch, texts)))
                file.flush()
                os.fsync(file.fileno())
                drawn += texts
                bar.update(len(batch))
    return drawn


def draw_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], sampling: Sampling
) -> list[FreeText]:
    """Draw one batch: the texts of these indices.

    Token t of text i is drawn with numbers 32 t to 32 t + 31 of the Philox stream of (seed, "free text i"), see `lmcore.random`, from
    softmax(logits / temperature) within the nucleus `top_p`. Nothing of the model's generation config but the end tokens is used.
    """
    ends = _end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            tokens, lengths = _generate(model, start_token(model, tokenizer), indices, sampling, ends)
    finally:
        model.train(was_training)
    texts = []
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        ended = row[length - 1] in ends
        text = str(tokenizer.decode(row[: length - ended], skip_special_tokens=True))
        texts.append(FreeText(text, length, ended))
    return texts


def start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that texts begin after: the tokenizer's bos, else that of the model's config, else an end token.

    A model without a bos was trained on documents separated by its end token, so that stands before a document too (GPT-2, Qwen).
    Raises: `UserError` if there is none of these.
    """
    configured = model.config.get_text_config().bos_token_id
    for token in (tokenizer.bos_token_id, configured, *_end_tokens(model, tokenizer)):
        if token is not None:
            return int(token)
    raise UserError("the model has neither a bos nor an eos token to begin a text after: set bos_token in its tokenizer")


def draw(probability: Float[Tensor, "rows vocabulary"], numbers: Float[Tensor, f"rows {_NUMBERS}"]) -> Int[Tensor, " rows"]:
    """Return one token per row, with these probabilities (which need not add up to 1), made from numbers uniform in [0, 1).

    The vocabulary is halved until one token is left; each number decides a halving by the share of the mass in each half. So rounding moves
    log2(vocabulary) boundaries, not all of them as it does in the cumulated distribution.

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]]).expand(3, 3), torch.tensor([0.2, 0.5, 0.9])[:, None].expand(3, 32))
    tensor([0, 2, 2])
    """
    depth = (probability.shape[-1] - 1).bit_length()
    levels = [pad(probability.double(), (0, 2**depth - probability.shape[-1]))]
    for _ in range(depth):
        lower, upper = levels[-1].chunk(2, dim=-1)
        levels.append(lower + upper)
    token = torch.zeros_like(levels[-1], dtype=torch.int64)
    for level, number in zip(levels[-2::-1], numbers.double().split(1, dim=-1), strict=False):
        half = level.shape[-1] // 2
        lower, upper = level.gather(-1, token), level.gather(-1, token + half)
        token = token + half * (number * (lower + upper) >= lower)
    return token[:, 0]


def _generate(
    model: PreTrainedModel, start: int, indices: Sequence[int], sampling: Sampling, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Tokens [rows, <= max_tokens], and how many of each row count."""
    end = torch.tensor(ends, dtype=torch.int64, device=model.device)
    running = torch.ones(len(indices), dtype=torch.bool, device=model.device)
    lengths = torch.zeros(len(indices), dtype=torch.int64, device=model.device)
    last, cache, tokens = torch.full((len(indices),), start, device=model.device), None, []
    for position in range(sampling.max_tokens):
        output = model(last[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probability = _nucleus(output.logits[:, -1].to(model.device).float() / sampling.temperature, sampling.top_p)
        damaged = probability.isnan().any(-1) & running
        if damaged.any():
            index = indices[int(damaged.nonzero()[0])]
            raise UserError(
                f"text {index}, token {position}: the model gives NaN; check its weights, or its dtype for overflow"
            )
        if position % 64 == 0:
            numbers = torch.stack([_numbers(sampling.seed, index, position) for index in indices]).to(model.device)
        last = draw(probability, numbers[:, position % 64])
        tokens.append(last)
        lengths += running
        running &= ~torch.isin(last, end)
        if not running.any():
            break
    return torch.stack(tokens, dim=1), lengths


def _numbers(seed: int, index: int, position: int) -> Float[Tensor, f"64 {_NUMBERS}"]:
    """What tokens `position` to `position + 63` of a text are drawn with."""
    return uniform(seed, f"free text {index}", 64 * _NUMBERS, start=position * _NUMBERS).unflatten(0, (64, _NUMBERS))


def _nucleus(logits: Float[Tensor, "rows vocabulary"], top_p: float) -> Float[Tensor, "rows vocabulary"]:
    """Probabilities; 0 for a token if those before it, in order of probability, make up `top_p` already."""
    probability = logits.softmax(-1)
    if top_p == 1:
        return probability
    descending, token = probability.sort(dim=-1, descending=True, stable=True)
    kept = descending.cumsum(-1) - descending < top_p
    return probability * torch.empty_like(kept).scatter(-1, token, kept)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None})


def _require_room(model: PreTrainedModel, sampling: Sampling) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sampling.max_tokens > positions:
        raise UserError(f"max_tokens is {sampling.max_tokens}: the model has {positions} positions, choose at most as many")


def _identity(model: PreTrainedModel) -> str:
    """A hash of each tensor's name, dtype, shape and sum of bits as integers, so that no run goes on with other weights."""
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()


@contextmanager
def _appending(out: Path, config: dict[str, Any]) -> Iterator[BinaryIO]:
    """Open `out/texts.jsonl` for reading from its start and appending, locked until the block ends."""
    Run(out, config)
    with open(out / "texts.jsonl", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends, however it ends
        except BlockingIOError:
            raise UserError(f"another process is writing into {out}: wait for it or choose another --out") from None
        file.seek(0)
        yield file


def _kept(file: BinaryIO, plan: Sequence[Sequence[int]], path: Path) -> list[FreeText]:
    """What the file holds of whole batches; what a killed run left of another one is cut off. Leaves `file` at its end."""
    kept: list[FreeText] = []
    for batch in plan:
        end, lines = file.tell(), [file.readline() for _ in batch]
        if not lines[-1].endswith(b"\n"):
            file.truncate(end)
            file.seek(end)
            return kept
        kept += map(_parsed, batch, lines, [path] * len(batch))
    if file.readline():
        raise UserError(f"{path}, line {len(kept) + 1}: the run has {len(kept)} texts; delete the file to start anew")
    return kept


def _line(index: int, text: FreeText) -> bytes:
    record = {"index": index, "tokens": text.tokens, "ended": text.ended, "text": text.text}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _parsed(index: int, line: bytes, path: Path) -> FreeText:
    try:
        record = json.loads(line)
        if record["index"] == index:
            return FreeText(str(record["text"]), int(record["tokens"]), bool(record["ended"]))
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}, line {index + 1} is not what this run wrote: delete the file to start anew")
