"""The options of the commands that run a model over conversations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmcore.cli import Command
from lmcore.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """Which model is run, where and how."""

    model: str
    """The fine-tuned model: folder or Hub id."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included."""
    device: str | None = None
    """Where to run, as cpu or cuda:1; by default the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype to compute in; a calibration holds for one alone."""

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and its tokenizer. Raises: `UserError` for a device that cannot be used here."""
        import torch

        from lmcore.models import load_causal_lm

        if self.batch_tokens < 1:
            raise UserError(f"--batch-tokens is {self.batch_tokens}: it must be at least 1")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
            raise UserError(f"--device {device} cannot be used here: {str(error).partition('. ')[0]}") from None
        return load_causal_lm(self.model, dtype=getattr(torch, self.dtype), device=device)


def positions(model: Any) -> int:
    """How many tokens the model was made for; a large number where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
