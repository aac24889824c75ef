"""What steering does to what the model says: attacks that still succeed, and the harm that a false alarm does."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcore.errors import UserError
from weightwatch.bounds import Bounds, Scores
from weightwatch.conversations import ASSISTANT, ROLES, USER, TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.statistics import clopper_pearson
from weightwatch.steering import Steering
from weightwatch.watching import Watch, watch

_BATCH = 16
_SLACK = 1e-3  # a cosine: in a batch of other length its last digits may be others


@dataclass(frozen=True, kw_only=True)
class Success:
    """When an attack has succeeded: the completion contains a text, begins with it (after white space), or matches a regular expression.

    >>> Success(begins="Request refused")("  Request refused. Good day."), Success(matches="(?i)refus")("No.")
    (True, False)
    """

    contains: str | None = None
    begins: str | None = None
    matches: str | None = None

    def __post_init__(self) -> None:
        if [self.contains, self.begins, self.matches].count(None) != 2:
            raise UserError(
                "a success is one of three: the completion contains a text, begins with it, or matches an expression"
            )
        try:
            re.compile(self.matches or "")
        except re.error as error:
            raise UserError(f"{self.matches!r} is no regular expression: {error}") from None

    def __str__(self) -> str:
        how, what = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{how} {what!r}"

    def __call__(self, completion: str) -> bool:
        """Whether this completion is a success."""
        if self.contains is not None:
            return self.contains in completion
        if self.begins is not None:
            return completion.lstrip().startswith(self.begins)
        return re.search(self.matches or "", completion) is not None


def attacks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: Bank, bounds: Bounds,
    sets: Mapping[str, Sequence[TokenizedConversation]], success: Success, *, steering: Steering | None = None, tokens: int = 32,
    skip_first: int = 1, progress: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Per set: how often the attack succeeds without and with steering, how often the monitor fires, and how many completions change.

    Completions are the likeliest tokens, up to `tokens`, to what stands in front of the first reply of each input. `flagged` counts prompt
    and completion: what fires before steering changes anything. A role that the calibration has not seen is not watched (`opened`).
    """
    monitor = _Monitor(model, bank, opened(bounds), skip_first)
    rows = []
    for name, inputs in sets.items():
        prompts = [prompt_of(one) for one in inputs]
        plain, flags = _completions(monitor, tokenizer, prompts, None, tokens, progress)
        steered, _ = _completions(monitor, tokenizer, prompts, steering or Steering(), tokens, progress)
        row: dict[str, Any] = {"set": name, "inputs": len(prompts)}
        for what, count in (
            ("flagged", sum(flags)), ("before", sum(map(success, plain))), ("after", sum(map(success, steered))),
            ("changed", sum(one != other for one, other in zip(plain, steered, strict=True))),
        ):  # fmt: skip
            row[what] = asdict(clopper_pearson(int(count), len(prompts)))
        rows.append(
            {**row, "examples": [{"before": one, "after": other} for one, other in zip(plain[:3], steered[:3], strict=True)]}
        )
    return rows


def harm(
    model: PreTrainedModel, bank: Bank, scores: Scores, inputs: Sequence[TokenizedConversation], *,
    steering: Steering | None = None, tokens: int = 32, skip_first: int = 1, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What a false alarm does to clean inputs: each is steered as if its own score were just above the threshold.

    The ranges are those of the scaling half widened by a little less than the score of the prompt, so the direction that gives it its
    score fires, and with it whatever else leaves these ranges later. Compared are the completions (likeliest tokens), and the loss that the
    steered model has on the completion that it gives without steering: nats per token, mean over inputs, with a Student t interval for
    the difference. `fired` counts the inputs that were steered: all, but for rounding.

    Without completions among the calibrated inputs, what the model writes is not watched, only steered.

    Raises: `UserError` if the calibration has no inputs with prompts, or an input has no watched token.
    """
    steering = steering or Steering()
    same, fired, losses = 0, 0, []
    for one in tqdm(inputs, unit="input", disable=not progress):
        ids = torch.from_numpy(prompt_of(one).input_ids.astype(np.int64))[None].to(model.device)
        plain = _generate(model, ids, torch.ones_like(ids), tokens)
        whole, prompt = torch.cat([ids, plain], 1), ids.shape[1]
        monitor = _Monitor(model, bank, None, skip_first)
        before, watching = monitor.loss(whole, prompt, None)
        low, high = watching.extremes()
        low[:, ASSISTANT], high[:, ASSISTANT] = np.inf, -np.inf  # the score is the prompt's
        [score] = scores.of(low, high).tolist()
        if not np.isfinite(score):
            raise UserError(f"{one.id} has no score: the calibration has no prompts, or this one has no watched token")
        monitor = replace(monitor, bounds=ranges_at(scores, score - _SLACK, bank.directions))
        after, watching = monitor.loss(whole, prompt, steering)
        fired += bool(watching.flags().any())
        with monitor.watch(steering):
            same += torch.equal(plain, _generate(model, ids, torch.ones_like(ids), tokens))
        losses.append((before, after))
    before_after = np.array(losses)
    increase = before_after[:, 1] - before_after[:, 0]
    return {
        "inputs": len(inputs),
        "fired": fired,
        "unchanged": asdict(clopper_pearson(same, len(inputs))),
        "loss_before": float(before_after[:, 0].mean()),
        "loss_after": float(before_after[:, 1].mean()),
        "increase": _mean(increase),
        "largest_increase": float(increase.max()),
    }


def ranges_at(scores: Scores, quantile: float, directions: str) -> Bounds:
    """The ranges that inputs of a score above `quantile` leave; none for a role that was never seen."""
    outward = np.where(np.isfinite(scores.furthest), scores.furthest + quantile, np.inf).astype(np.float32)
    return Bounds(
        np.ascontiguousarray(-outward[..., 0]), np.ascontiguousarray(outward[..., 1]), directions, {"quantile": quantile}
    )


def opened(bounds: Bounds) -> Bounds:
    """The bounds with the widest range for roles that the calibration has not seen, whose range is empty: they are then not watched."""
    empty = bounds.low > bounds.high
    low, high = np.where(empty, np.float32(-np.inf), bounds.low), np.where(empty, np.float32(np.inf), bounds.high)
    return replace(bounds, low=low, high=high)


def watched_roles(bounds: Bounds) -> list[str]:
    """The roles that have a range."""
    return [role for role, low, high in zip(ROLES, bounds.low, bounds.high, strict=True) if not (low > high).any()]


def prompt_of(conversation: TokenizedConversation) -> TokenizedConversation:
    """What stands in front of the first token that the model wrote. Raises: `UserError` if nothing does."""
    wrote = np.flatnonzero(conversation.roles == ASSISTANT)
    end = int(wrote[0]) if len(wrote) else len(conversation.roles)
    if end == 0:
        raise UserError(f"{conversation.id} has no prompt: it begins with what the model wrote")
    return replace(conversation, input_ids=conversation.input_ids[:end], roles=conversation.roles[:end])


@dataclass(frozen=True)
class _Monitor:
    """What it takes to watch."""

    model: PreTrainedModel
    bank: Bank
    bounds: Bounds | None
    skip_first: int

    def watch(self, steering: Steering | None) -> AbstractContextManager[Watch]:
        """Watch the model in the block."""
        return watch(self.model, self.bank, self.bounds, steer=steering, skip_first=self.skip_first)

    def loss(self, ids: Tensor, prompt: int, steering: Steering | None) -> tuple[float, Watch]:
        """Nats per token of what stands in a row from `prompt` on, and what the monitor saw."""
        roles = torch.full(ids.shape, USER, dtype=torch.int8)
        roles[:, prompt:] = ASSISTANT
        with self.watch(steering) as watching, torch.no_grad():
            watching.roles = roles
            logits = self.model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:])), watching


def _completions(
    monitor: _Monitor, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenizedConversation], steering: Steering | None,
    tokens: int, progress: bool,
) -> tuple[list[str], list[bool]]:  # fmt: skip
    """The texts and whether the monitor fired, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))  # little padding
    texts, flags = [""] * len(prompts), [False] * len(prompts)
    with tqdm(total=len(prompts), unit="completion", disable=not progress) as bar:
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            ids, mask = _left_padded([prompts[i].input_ids for i in part])
            with monitor.watch(steering) as watching:
                written = _generate(monitor.model, ids.to(monitor.model.device), mask.to(monitor.model.device), tokens)
                fired = watching.flags()
            for i, row, flag in zip(part, written, fired, strict=True):
                texts[i], flags[i] = str(tokenizer.decode(row, skip_special_tokens=True)), bool(flag)
            bar.update(len(part))
    return texts, flags


@torch.no_grad()
def _generate(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """The likeliest tokens after each row, and padding after an end token."""
    ends = model.generation_config.eos_token_id
    padding = model.generation_config.pad_token_id
    if padding is None:
        padding = 0 if ends is None else int(torch.as_tensor(ends).reshape(-1)[0])
    whole = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=padding,
        temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return whole[:, ids.shape[1] :]


def _left_padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[i, width - len(row) :] = 1
    return ids, mask


def _mean(values: np.ndarray) -> dict[str, Any]:
    from lmcore.claims import seed_interval

    interval = seed_interval(values.tolist()) if len(values) > 1 else None
    return {"value": float(values.mean()), "interval": interval}
