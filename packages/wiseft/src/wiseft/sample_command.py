"""The command `wiseft sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lmcore.cli import Command


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Draw n completions of each problem and judge them; `wiseft passk OUT/samples.jsonl` reads the result.

    PROBLEMS has one JSON object a line with problem (an id), prompt and answer; the files of GSM8K, MATH-500 and AIME are read as
    they are. A sample depends on the seed, its problem and its number, not on its place in a batch. The same command continues
    a run that was stopped, to the same bytes on the same machine.
    """

    model: tyro.conf.Positional[str]
    """Folder or Hub id of the model, or smollm2."""
    problems: Path
    """JSONL file of problems."""
    out: Path
    """Folder for samples.jsonl and run.json."""
    verifier: Literal["gsm8k", "boxed", "exact", "math"]
    r"""gsm8k: number after ####, else the last; boxed: text in the last \boxed{}; exact: all the text; math: value, by math-verify."""
    n: int = 64
    """Samples of each problem."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token."""
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
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. vllm must be installed; it draws its own random numbers and is not tested here."""
    overwrite: bool = False
    """Replace a run with other options in OUT."""

    def run(self) -> dict[str, Any]:
        """Sample, and return the counts."""
        from wiseft.decoding import Decoding
        from wiseft.problems import read_problems
        from wiseft.sampling import sample
        from wiseft.verifiers import VERIFIERS

        decoding = Decoding(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        problems = read_problems(self.problems, self.limit)
        model, tokenizer = self._load()
        return sample(
            model,
            tokenizer,
            problems,
            n=self.n,
            out=self.out,
            decoding=decoding,
            verifier=VERIFIERS[self.verifier],
            seed=self.seed,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            template=self.prompt_template,
            chat=self.chat,
            overwrite=self.overwrite,
        )

    def show(self, result: dict[str, Any]) -> None:
        """Print the counts, what stands out among them, and where to go on."""
        print(f"{result['problems']} problems, {result['samples']} samples: {result['correct']:.1%} correct")
        if result["ended"] < 1:
            print(f"{1 - result['ended']:.1%} were cut off at {self.max_new_tokens} tokens: see --max-new-tokens")
        if result["gave_up"]:
            print(f"{result['gave_up']} could not be judged by {self.verifier} and count as incorrect")
        if result["tokens_per_second"]:
            print(f"{result['tokens_per_second']:.0f} tokens/s")
        print(f"wrote {self.out / 'samples.jsonl'}")

    def _load(self) -> tuple[Any, Any]:
        if self.engine == "vllm":
            from wiseft.vllm_generation import load

            return load(self.model, self.dtype)
        import torch

        from lmcore.models import load_causal_lm

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_causal_lm(self.model, dtype=getattr(torch, self.dtype), device=device)
