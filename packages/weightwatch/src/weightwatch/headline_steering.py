"""What steering does to replies: to those of prompts that fire, and to those of clean prompts when an alarm is false."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightwatch.bounds import Bounds
from weightwatch.conversations import ASSISTANT, USER
from weightwatch.directions import Bank
from weightwatch.headline_measures import share
from weightwatch.organisms import encode, replies
from weightwatch.watching import watch


@dataclass(frozen=True)
class Speaker:
    """A fine-tune whose prompts are watched; its own words are not, since prompts alone were calibrated on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: Bank
    tokens: int
    """Of each reply."""

    def say(self, prompts: Sequence[str]) -> list[str]:
        """Replies without steering."""
        return replies(self.model, self.tokenizer, prompts, tokens=self.tokens)

    def say_steered(self, prompts: Sequence[str], bounds: Bounds) -> tuple[list[str], Bool[np.ndarray, "prompts directions"]]:
        """Replies while directions that leave their bounds in the prompt are removed, and which were, rows not in the order of prompts."""
        with watch(self.model, self.bank, _of_prompts(bounds), steer="remove") as watching:
            said = self.say(prompts)
        return said, watching.steered()

    def false_alarm(self, prompts: Sequence[str], own: Sequence[str], bounds: Bounds) -> dict[str, Any]:
        """What steering without cause does to clean prompts with these own replies: which stay the same, and nats per token of own ones."""
        said, fired = self.say_steered(prompts, bounds)
        before = self._nats(prompts, own)
        with watch(self.model, self.bank, _of_prompts(bounds), steer="remove"):
            after = self._nats(prompts, own)
        examples = [
            {"prompt": prompt, "own": one, "steered": other} for prompt, one, other in zip(prompts, own, said, strict=True)
        ]
        return {
            "directions": int(fired[0].sum()),
            "unchanged": share(one == other for one, other in zip(own, said, strict=True)),
            "nats_per_token": [before, after],
            "examples": examples[:6],
        }

    @torch.inference_mode()
    def _nats(self, prompts: Sequence[str], said: Sequence[str]) -> float:
        """Mean negative log-probability of the tokens of replies."""
        total, count = 0.0, 0
        for start in range(0, len(prompts), 32):
            chunk = slice(start, start + 32)
            asked = encode(self.tokenizer, prompts[chunk]).to(self.model.device)
            answer = self.tokenizer(
                said[chunk], add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            inputs = {name: torch.cat([asked[name], answer[name]], 1) for name in ("input_ids", "attention_mask")}
            width = answer["input_ids"].shape[1]
            logits = self.model(**inputs, logits_to_keep=width + 1).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), answer["input_ids"], reduction="none")
            there = answer["attention_mask"].bool()
            total, count = total + nats[there].sum().item(), count + int(there.sum())
        return total / count


def usual(fired: Bool[np.ndarray, "prompts directions"]) -> Bool[np.ndarray, " directions"]:
    """The directions that more than half of the prompts fire, or else the one that most do."""
    often: np.ndarray = fired.mean(0)
    return (often > 0.5) | (often == often.max())


def always(bounds: Bounds, fired: Bool[np.ndarray, " directions"]) -> Bounds:
    """Bounds that the directions `fired` leave at the first token that is watched, and no other ever."""
    low, high = (np.full_like(bounds.low, end) for end in (-np.inf, np.inf))
    low[USER, fired] = high[USER, fired] = 2.0  # no cosine is there
    return Bounds(low, high, bounds.directions)


def _of_prompts(bounds: Bounds) -> Bounds:
    """The bounds for what the model is given; what it writes never leaves them."""
    low, high = bounds.low.copy(), bounds.high.copy()
    low[ASSISTANT], high[ASSISTANT] = -np.inf, np.inf
    return Bounds(low, high, bounds.directions, bounds.rule)
