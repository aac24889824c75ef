"""Completions of a model under the monitor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightwatch.batch import UNWATCHED
from weightwatch.bounds import Bounds
from weightwatch.conversations import Conversation, TokenizedConversation
from weightwatch.directions import Bank
from weightwatch.recording import Peaks
from weightwatch.steering import Steering
from weightwatch.watching import watch


@dataclass(frozen=True)
class Completions:
    """What a model wrote for a batch of prompts, and what the monitor saw."""

    texts: list[str]
    peaks: Peaks
    token_ids: list[Mapping[int, int]]
    """Of prompt and completion, by position."""
    steered: list[list[str]]
    """Labels of the directions that were steered."""


def as_prompt(conversation: Conversation) -> Conversation:
    """A conversation without the replies at its end: what the model is to answer."""
    messages = list(conversation.messages)
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    return Conversation(conversation.id, tuple(messages))


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: Bank, bounds: Bounds, prompts: Sequence[TokenizedConversation], *,
    max_new_tokens: int, steer: Steering | None = None, temperature: float = 0.0, skip_first: int = 1, seed: int = 0,
) -> Completions:  # fmt: skip
    """Generate for prompts, in one batch padded on the left, with earlier replies among them in the role of the assistant.

    `temperature` 0 always takes the most probable token. The same seed draws the same tokens for the same batch.
    """
    width = max(len(one.input_ids) for one in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    roles = torch.full((len(prompts), width), UNWATCHED, dtype=torch.int8)
    for row, one in enumerate(prompts):
        start = width - len(one.input_ids)
        ids[row, start:], roles[row, start:] = torch.from_numpy(one.input_ids), torch.from_numpy(one.roles)
        mask[row, start:] = 1
    end = tokenizer.eos_token_id if model.generation_config.eos_token_id is None else model.generation_config.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0] if isinstance(end, list) else end
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    generator: Any = model
    with watch(model, bank, bounds, steer=steer, skip_first=skip_first) as watching, torch.random.fork_rng():
        torch.manual_seed(seed)
        watching.roles = roles
        ids, mask = ids.to(model.device), mask.to(model.device)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": padding or 0, **sampling}
        written = generator.generate(ids, attention_mask=mask, **options)
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        fired = watching.steered()
        steered = [[label for label, on in zip(watching.labels, row, strict=True) if on] for row in fired]
        return Completions(texts, watching.peaks(), [watching.token_ids(row) for row in range(len(prompts))], steered)
