"""The options that `wiseft sample` and `wiseft select` have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcore.cli import Command
from lmcore.errors import UserError

if TYPE_CHECKING:
    from wiseft.problems import Problem


@dataclass(frozen=True, kw_only=True)
class SamplingCommand(Command):
    """Which problems, how completions of them are drawn and judged, and where."""

    problems: Path
    """JSONL file of problems: problem (an id), prompt and answer; or a file of GSM8K, MATH-500 or AIME."""
    out: Path
    """Folder for the results."""
    verifier: Literal["gsm8k", "boxed", "exact", "math"]
    r"""gsm8k: number after ####, else the last; boxed: text in the last \boxed{}; exact: all the text; math: value, by math-verify."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the most probable tokens that make up this probability."""
    min_p: float | None = None
    """Keep the tokens at least this share as probable as the most probable one."""
    max_new_tokens: int = 512
    """Cut a completion off after this many tokens."""
    batch_size: int = 64
    """Completions drawn together. Equal samples are promised at an equal batch size."""
    prompt_template: str = "{prompt}"
    """Text put to the model, with {prompt} for the problem's prompt."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Put the text in the tokenizer's chat template as the user's turn; auto: if it has one."""
    limit: int | None = None
    """Only the first problems of the file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype to compute in."""
    device: str | None = None
    """Where to run, e.g. cpu or cuda:1; by default the GPU if there is one."""
    overwrite: bool = False
    """Replace a run with other options in OUT."""

    def read_problems(self) -> "list[Problem]":
        """Read the first `limit` problems of the file."""
        from wiseft.problems import read_problems

        return read_problems(self.problems, self.limit)

    def sampling(self) -> dict[str, Any]:
        """The keyword arguments that `sampling.sample` and `selection.select` share."""
        from wiseft.verifiers import VERIFIERS

        return {
            "out": self.out,
            "verifier": VERIFIERS[self.verifier],
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "template": self.prompt_template,
            "chat": self.chat,
            "overwrite": self.overwrite,
        }

    def placement(self) -> dict[str, Any]:
        """The keyword arguments `dtype` and `device` of a model. Raises: `UserError` for a device that cannot be used here."""
        import torch

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
            raise UserError(f"--device {device} cannot be used here: {str(error).partition('. ')[0]}") from None
        return {"dtype": getattr(torch, self.dtype), "device": device}
