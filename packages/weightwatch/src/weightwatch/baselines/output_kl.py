"""How much the outputs of two models differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from lmcore.errors import UserError
from weightwatch.baselines.hidden_states import Batch, batches
from weightwatch.conversations import TokenizedConversation


@dataclass(frozen=True)
class OutputKL:
    """score(x) = KL(p_post || p_base) in nats, p being the distributions of the token that follows x.

    It needs both models and a forward of each; there is nothing to fit.
    """

    base: PreTrainedModel
    post: PreTrainedModel
    name: ClassVar[str] = "output KL"
    supervised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (self.base, self.post)]
        if sizes[0] != sizes[1]:
            raise UserError(f"base and fine-tune score {sizes[0]} and {sizes[1]} tokens: their outputs cannot be compared")

    def fit(self, clean: Sequence[TokenizedConversation], triggered: Sequence[TokenizedConversation] = ()) -> None:
        """Nothing is learnt."""

    def score(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, " inputs"]:
        """One number per input."""
        scores = np.zeros(len(inputs))
        for batch in batches(inputs):
            post, base = (_next(model, batch) for model in (self.post, self.base))
            scores[batch.numbers] = (post.exp() * (post - base)).sum(-1).clamp(min=0).numpy()
        return scores


@torch.inference_mode()
def _next(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities of the token after each row, float64 [rows, vocabulary]."""
    ends, end = batch.last.unique(return_inverse=True)  # logits of these places alone: rows are of similar length
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "logits_to_keep": ends}
    logits = model(**{name: one.to(model.device) for name, one in inputs.items()}, use_cache=False).logits
    return logits[torch.arange(len(logits)), end].double().log_softmax(-1).cpu()
