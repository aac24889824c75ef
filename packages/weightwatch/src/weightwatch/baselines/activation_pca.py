"""The distance of activations from those of clean inputs, by principal components."""

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
class ActivationPCA:
    """Mahalanobis distance of the last token's hidden state h under probabilistic PCA of clean inputs.

    With the mean μ, the r leading principal axes w_i of variance λ_i and σ², the mean variance along the other d - r axes:

        score(x) = Σ_i (w_iᵀ(h - μ))² / λ_i + |h - μ - Σ_i w_i w_iᵀ(h - μ)|² / σ²

    the distance inside the leading components and the residual outside, each in its own unit. r is at most a quarter of the clean inputs.

    Source: Tipping and Bishop 1999, "Probabilistic principal component analysis" (the covariance W Wᵀ + σ² I).
    """

    model: PreTrainedModel
    block: str
    components: int = 16
    name: ClassVar[str] = "PCA of activations"
    supervised: ClassVar[bool] = False

    def fit(self, clean: Sequence[TokenizedConversation], triggered: Sequence[TokenizedConversation] = ()) -> None:
        """Find the components. Raises: `UserError` for fewer than 8 clean inputs."""
        if len(clean) < 8:
            raise UserError(f"{self.name} cannot be fit to {len(clean)} clean inputs: give at least 8")
        last = self._last(clean)
        self.mean = last.mean(0)
        rank = min(self.components, len(clean) // 4, last.shape[1] - 1)
        _, singular, axes = np.linalg.svd(last - self.mean, full_matrices=False)
        variances = singular**2 / (len(clean) - 1)
        least = np.finfo(np.float32).eps * variances[0] or 1.0  # all inputs alike: any difference counts
        self.axes, self.variances = axes[:rank], np.maximum(variances[:rank], least)
        self.rest = max(float(variances[rank:].sum()) / (last.shape[1] - rank), least)

    def score(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, " inputs"]:
        """One number per input."""
        away = self._last(inputs) - self.mean
        along = away @ self.axes.T
        outside = (away**2).sum(1) - (along**2).sum(1)
        return (along**2 / self.variances).sum(1) + np.maximum(outside, 0) / self.rest

    def _last(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, "inputs d"]:
        both = features(self.model, self.block, inputs)
        return both[:, : both.shape[1] // 2]
