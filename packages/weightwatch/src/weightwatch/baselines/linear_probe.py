"""A linear classifier of activations: supervised, so it knows the attack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from lmcore.errors import UserError
from weightwatch.baselines.hidden_states import features
from weightwatch.conversations import TokenizedConversation


@dataclass
class LinearProbe:
    """Logistic regression from clean to triggered inputs: score(x) = wᵀ f(x) + b.

    f is the hidden state of the last token beside the mean over tokens, each coordinate scaled to unit variance over what it is fit to;
    w has an L2 penalty of weight 1/C = 1. It is **supervised**: it must be shown triggered inputs, which the weight difference does not
    need, so it tells what could be known with labels rather than what a monitor could do.
    """

    model: PreTrainedModel
    block: str
    name: ClassVar[str] = "linear probe (supervised)"
    supervised: ClassVar[bool] = True

    def fit(self, clean: Sequence[TokenizedConversation], triggered: Sequence[TokenizedConversation] = ()) -> None:
        """Fit the classifier, both kinds weighing the same. Raises: `UserError` without inputs of both kinds."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if not (clean and triggered):
            raise UserError(f"{self.name} is fit to clean and triggered inputs; got {len(clean)} and {len(triggered)}")
        seen = np.concatenate([features(self.model, self.block, inputs) for inputs in (clean, triggered)])
        classes = np.repeat([0, 1], [len(clean), len(triggered)])
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        self.classifier.fit(seen, classes)

    def score(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, " inputs"]:
        """One number per input."""
        if not inputs:
            return np.zeros(0)
        return self.classifier.decision_function(features(self.model, self.block, inputs))
