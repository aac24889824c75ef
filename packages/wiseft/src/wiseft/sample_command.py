"""The command `wiseft sample`."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from wiseft.sampling_options import SamplingCommand


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingCommand):
    """Draw n completions of each problem and judge them; `wiseft passk OUT/samples.jsonl` reads the result.

    A sample depends on the seed, its problem and its number, not on its place in a batch. The same command continues a run that
    was stopped, to the same bytes on the same machine.
    """

    model: tyro.conf.Positional[str]
    """Folder or Hub id of the model, or smollm2."""
    n: int = 64
    """Samples of each problem."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. vllm must be installed; it draws its own random numbers and is not tested here."""

    def run(self) -> dict[str, Any]:
        """Sample, and return the counts."""
        from wiseft.decoding import Decoding
        from wiseft.sampling import sample

        decoding = Decoding(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        problems = self.read_problems()
        model, tokenizer = self._load()
        return sample(model, tokenizer, problems, n=self.n, decoding=decoding, **self.sampling())

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
        from lmcore.models import load_causal_lm

        return load_causal_lm(self.model, **self.placement())
