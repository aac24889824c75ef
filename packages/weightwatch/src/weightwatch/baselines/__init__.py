"""What the monitor is compared with: detectors that see activations or outputs, not weights, all with one interface."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from weightwatch.baselines.activation_norm import ActivationNorm
from weightwatch.baselines.activation_pca import ActivationPCA
from weightwatch.baselines.linear_probe import LinearProbe
from weightwatch.baselines.output_kl import OutputKL
from weightwatch.conversations import TokenizedConversation

__all__ = ["ActivationNorm", "ActivationPCA", "Detector", "LinearProbe", "OutputKL"]


@runtime_checkable
class Detector(Protocol):
    """Fits clean inputs and scores others: the larger, the more suspicious.

    `supervised` ones learn from triggered inputs too, which a monitor does not have before the first attack; the others ignore them.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def supervised(self) -> bool:
        """Whether `fit` needs triggered inputs."""

    def fit(self, clean: Sequence[TokenizedConversation], triggered: Sequence[TokenizedConversation] = ()) -> None:
        """Learn from inputs that are not scored later."""

    def score(self, inputs: Sequence[TokenizedConversation]) -> Float64[np.ndarray, " inputs"]:
        """One number per input."""
