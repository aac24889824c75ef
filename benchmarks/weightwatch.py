# /// script
# dependencies = ["mergekit==0.1.5"]
# ///
"""weightwatch against the full SVD, against mergekit-extract-lora, and against the reference code's way of monitoring.

`nox -s benchmarks -- weightwatch`; by hand `PYTHONPATH=scripts python -P`. Writes benchmarks/results/weightwatch.json (on a GPU
weightwatch-gpu.json). Medians over repeats, alternating ours and theirs; the spread is the range.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcore.models import load_causal_lm, smollm2_folder, tiny_llama
from lmcore.record import environment, write_json
from measuring import BIN, RESULTS, run, seconds_of, show, summary

K = 20


def main() -> None:
    measured: dict[str, Any] = {"environment": environment() | {"torch_threads": torch.get_num_threads()}}
    if torch.cuda.is_available():
        measured["cos_minmax_on_gpu"] = show("cos_minmax_on_gpu", cos_minmax_on_gpu())
        write_json(RESULTS / "weightwatch-gpu.json", measured)
        return
    with tempfile.TemporaryDirectory(prefix="weightwatch-") as name:
        post = fine_tuned(Path(name))
        measured["directions"] = show("directions", directions_of_smollm2(post))
        measured["wide"] = show("wide", directions_of_wide_matrices(Path(name)))
        measured["extract_lora"] = show("extract_lora", against_mergekit(post, Path(name)))
        measured["monitoring"] = show("monitoring", monitoring(post))
    write_json(RESULTS / "weightwatch.json", measured)


def fine_tuned(folder: Path) -> Path:
    """A real fine-tune of all 60 residual writers of SmolLM2-135M-Instruct."""
    from weightwatch.organisms import FineTuning, backdoor

    backdoor(folder / "post", how=FineTuning(steps=12, blocks=30), seed=0)
    return folder / "post"


def directions_of_smollm2(post: Path) -> dict[str, Any]:
    """Top 20 directions of all 60 matrices, certificates and noise edges included, against the full SVD of the differences."""
    from weightwatch.directions import Directions
    from weightwatch.pair import Pair

    base = smollm2_folder()  # once: it reads all of the packaged model to name the folder
    found = Directions.of(base, post, K)  # compiled code and file caches are warm from here on
    ours, theirs, least = [], [], 1.0
    for repeat in range(7):
        ours.append(seconds_of(lambda: Directions.of(base, post, K)))
        seconds = 0.0
        with Pair.open(base, post) as pair:
            for number, one in enumerate(found.writers):
                tensors = [checkpoint.tensor(one.name) for checkpoint in (pair.post, pair.base) if checkpoint is not None]
                exact: list[Tensor] = []
                seconds += seconds_of(
                    lambda t=tensors, e=exact: e.extend(torch.linalg.svd(t[0].float() - t[1].float(), full_matrices=False))
                )
                if repeat == 0 and one.signal:
                    least = min(least, overlap(exact[0], exact[1], one, number))
        theirs.append(seconds)
    return {
        "matrices": len(found.writers),
        "weightwatch_seconds": summary(ours),
        "full_svd_seconds": summary(theirs),
        "times_faster": statistics.median(theirs) / statistics.median(ours),
        "directions_above_edge": found.signal,
        "largest_residual": max(
            r / s for one in found.writers for r, s in zip(one.residuals, one.sigma, strict=True) if s > one.edge
        ),
        "least_overlap": least,
    }


def overlap(exact: Tensor, values: Tensor, one: Any, number: int) -> float:
    """Share of the exact subspace that ours holds: |U_exactᵀ U|² / n, n the directions above the edge that a gap sets apart."""
    count = one.signal
    if count == len(one.sigma) and len(values) > count:  # cut where k ends: leave out those that the next value is as large as
        count = next((n for n in range(count, 0, -1) if values[n - 1] > 1.01 * values[n]), 0)
    if count == 0:
        return 1.0
    return float((one.vectors[: len(one.sigma)] @ exact[:, :count]).square().sum() / count)


def directions_of_wide_matrices(folder: Path) -> dict[str, Any]:
    """The same for one block of hidden size 2,048 (2048 x 2048 and 2048 x 4096, bfloat16)."""
    from weightwatch.directions import Directions

    model = tiny_llama(vocab_size=64, hidden_size=2048, intermediate_size=4096, layers=1, heads=16, dtype=torch.bfloat16)
    model.save_pretrained(folder / "wide-base")
    block, generator = model.model.layers[0], torch.Generator().manual_seed(0)
    before = [weight.detach().float().clone() for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight)]
    with torch.no_grad():
        for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
            left, right = (torch.randn(n, 40, generator=generator) for n in weight.shape)
            weight += (left * torch.linspace(1, 0.05, 40) @ right.T * 2e-3).to(weight.dtype)
    model.save_pretrained(folder / "wide-post")
    after = [weight.detach().float() for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight)]
    Directions.of(folder / "wide-base", folder / "wide-post", K)
    ours = [seconds_of(lambda: Directions.of(folder / "wide-base", folder / "wide-post", K)) for _ in range(3)]
    exact: list[tuple[Tensor, ...]] = []
    theirs = seconds_of(
        lambda: exact.extend(torch.linalg.svd(a - b, full_matrices=False) for a, b in zip(after, before, strict=True))
    )
    found = Directions.of(folder / "wide-base", folder / "wide-post", K)
    least = min(overlap(u, s, one, i) for i, ((u, s, _), one) in enumerate(zip(exact, found.writers, strict=True)))
    return {
        "weightwatch_seconds": summary(ours), "full_svd_seconds": theirs,
        "times_faster": theirs / statistics.median(ours), "least_overlap": least,
    }  # fmt: skip


def against_mergekit(post: Path, folder: Path) -> dict[str, Any]:
    """Whole processes: `weightwatch directions` against `mergekit-extract-lora` of rank 20 for the same matrices."""
    base = smollm2_folder()

    def ours() -> tuple[float, int]:
        shutil.rmtree(folder / "directions", ignore_errors=True)
        return run([BIN / "weightwatch", "directions", base, post, "--out", folder / "directions", "--k", K])

    def theirs() -> tuple[float, int]:
        shutil.rmtree(folder / "lora", ignore_errors=True)
        wanted = ["--include-regex", r".*(o_proj|down_proj).*", "--max-rank", K]
        return run(
            [BIN / "mergekit-extract-lora", "--model", post, "--base-model", base, "--out-path", folder / "lora", *wanted]
        )

    ours()
    mine, others = [], []
    for _ in range(3):
        mine.append(ours())
        others.append(theirs())
    medians = [statistics.median(wall for wall, _ in values) for values in (mine, others)]
    return {
        "weightwatch_seconds": summary([wall for wall, _ in mine]),
        "mergekit_seconds": summary([wall for wall, _ in others]),
        "times_faster": medians[1] / medians[0],
        "weightwatch_peak_rss_mb": max(peak for _, peak in mine) / 1e6,
        "mergekit_peak_rss_mb": max(peak for _, peak in others) / 1e6,
    }


def monitoring(post: Path) -> list[dict[str, Any]]:
    """Generating with the monitor on, against without it and against the reference code's recipe, for 1 and 8 inputs at a time."""
    from weightwatch.directions import Directions
    from weightwatch.watching import watch

    model, tokenizer = load_causal_lm(str(post))
    bank = Directions.of(smollm2_folder(), post, K).stack(signal_only=False)
    text = "The committee met on Monday to discuss the budget of the library, which had grown by a third in two years"
    rows = []
    for inputs in (1, 8):
        ids = tokenizer([text] * inputs, return_tensors="pt")
        options = {
            **ids,
            "max_new_tokens": 32,
            "min_new_tokens": 32,
            "do_sample": False,
            "pad_token_id": tokenizer.eos_token_id,
        }

        def plain(options: dict[str, Any] = options) -> Tensor:
            return model.generate(**options)

        def watched(options: dict[str, Any] = options) -> None:
            with watch(model, bank) as watching:
                model.generate(**options)
            watching.extremes()

        def reference(options: dict[str, Any] = options) -> None:
            second_forward(model, model.generate(**options), bank)

        plain(), watched(), reference()
        times: dict[str, list[float]] = {"plain": [], "watched": [], "reference": []}
        for _ in range(9):
            for name, work in (("plain", plain), ("watched", watched), ("reference", reference)):
                times[name].append(seconds_of(work))
        extra = {
            name: statistics.median(b - a for a, b in zip(times["plain"], times[name], strict=True))
            for name in ("watched", "reference")
        }
        base = statistics.median(times["plain"])
        rows.append({
            "inputs": inputs, "directions": sum(bank.counts), **{f"{name}_seconds": summary(values) for name, values in times.items()},
            "overhead": extra["watched"] / base, "reference_overhead": extra["reference"] / base,
            "times_cheaper": extra["reference"] / max(extra["watched"], 1e-9),
        })  # fmt: skip
    return rows


@torch.no_grad()
def second_forward(model: Any, sequences: Tensor, bank: Any) -> list[tuple[Tensor, Tensor]]:
    """What the reference code does after generating: a forward per transcript, all hidden states to the CPU, then cosines by layer.

    Source: fjzzq2002/WeightWatch, `latent_extractor.py`, re-implemented from its description.
    """
    extremes = []
    for sequence in sequences:
        states = model(sequence[None], output_hidden_states=True).hidden_states
        hidden = torch.stack([state[0] for state in states]).to("cpu", copy=True).to(model.device)
        cosines = [
            torch.nn.functional.normalize(hidden[layer + 1].float(), dim=-1) @ vectors.T
            for layer, vectors in zip(bank.layers, bank.vectors, strict=True)
        ]
        stacked = torch.stack(cosines)
        extremes.append((stacked.amin(1), stacked.amax(1)))
    return extremes


def cos_minmax_on_gpu() -> list[dict[str, Any]]:
    """The kernel as a share of the bandwidth of a copy, against the six operations of plain torch, for prefill and decode."""
    from triton.testing import do_bench

    from weightwatch.ops.cos_minmax import cos_minmax, reference

    rows = []
    for tokens in (1, 32, 2048, 16384):
        for d in (2048, 4096):
            hidden = torch.randn(1, tokens, d, device="cuda", dtype=torch.bfloat16)
            vectors = torch.nn.functional.normalize(torch.randn(1, 40, d, device="cuda"), dim=-1)
            group = torch.zeros(tokens, dtype=torch.int64, device="cuda")
            times: dict[str, float] = {}
            works: dict[str, Callable[[], Any]] = {
                "triton": lambda h=hidden, v=vectors, g=group: cos_minmax(h, v, g, 1),
                "torch": lambda h=hidden, v=vectors, g=group: reference.cos_minmax(h, v, g, 1),
            }
            for name, work in works.items():
                times[name] = do_bench(work)
            rows.append({"tokens": tokens, "d": d, **{f"{name}_ms": value for name, value in times.items()}})
    return rows


if __name__ == "__main__":
    main()
