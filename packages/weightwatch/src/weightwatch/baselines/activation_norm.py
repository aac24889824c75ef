"""The norm of the activation difference of two models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from weightwatch.baselines.hidden_states import batches, hidden_states, watched
from weightwatch.conversations import TokenizedConversation


@dataclass(frozen=True)
class ActivationNorm:
    """score(x) = max over tokens t > 0 of |h_post(x, t) - h_base(x, t)|, h being what the module `block` returns.

    It needs both models in memory and a forward of each; there is nothing to fit. An input of one token is scored by it.

    Source: a baseline of Zhong and Raghunathan 2025 (arXiv 2508.00161); which tokens and layer they take is our choice.
    """

    base: PreTrainedModel
    post: PreTrainedModel
    block: str
    name: ClassVar[str] = "activation-difference norm"
    supervised: ClassVar[bool] = False

    def fit(self, clean: Sequence[TokenizedConversation], triggered: Sequence[TokenizedConversation] = ()) -> None:
        """Nothing is learnt."""

    def score(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, " inputs"]:
        """One number per input."""
        scores = np.zeros(len(inputs))
        for batch in batches(inputs):
            post, base = (hidden_states(model, self.block, batch) for model in (self.post, self.base))
            norms = (post - base).norm(dim=-1).masked_fill(~watched(batch), 0.0)
            scores[batch.numbers] = norms.amax(1).double().numpy()
        return scores
