# /// script
# dependencies = ["mergekit==0.1.5"]
# ///
"""siftmasks against what a careful person would write in torch, against mergekit, and against training again.

`nox -s benchmarks -- siftmasks`; by hand `PYTHONPATH=scripts python -P`. Writes benchmarks/results/siftmasks.json (on a GPU
siftmasks-gpu.json). Medians over repeats, alternating ours and theirs; the spread is the range.
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcore import random
from lmcore.models import tiny_llama
from lmcore.record import environment, write_json
from lmcore.text import character_tokenizer
from measuring import BIN, RESULTS, run, seconds_of, show, summary

SIZE = 2**25  # weights of the tensors that kernels are timed on
KEY = random.key(0, "weight")
STEP = 2.0**-12  # of the grid
ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789"


def main() -> None:
    measured: dict[str, Any] = {"environment": environment() | {"torch_threads": torch.get_num_threads()}}
    if torch.cuda.is_available():
        for measure in (sift_adam_on_gpu, apply_mask_on_gpu):
            measured[measure.__name__] = show(measure.__name__, measure())
        write_json(RESULTS / "siftmasks-gpu.json", measured)
        return
    for measure in (sift_adam, apply_mask, forget_one_of_64, ledger_of_64):
        measured[measure.__name__] = show(measure.__name__, measure())
    write_json(RESULTS / "siftmasks.json", measured)


def sift_adam() -> dict[str, Any]:
    """One step on 2^25 weights: ours against torch's Adam, the faster of its two forms, and the projection after it.

    Torch gets the sign vector for nothing, as floats in memory, and does not write the weight that the forward pass reads.
    """
    from siftmasks.ops.sift_adam import sift_adam as step

    generator = torch.Generator().manual_seed(0)
    base, grad = (torch.randn(SIZE, generator=generator) * scale for scale in (0.02, 1e-3))
    state = [torch.zeros(SIZE) for _ in range(3)]
    weight, steps = base.clone(), iter(range(1, 1000))
    options = {"key": KEY, "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def ours() -> None:
        step(weight, base, *state, grad, **options, step=next(steps))

    signs = random.signs(0, "weight", SIZE).float()
    torches = {}
    for name, fused in {"torch_adam": False, "torch_fused_adam": True}.items():
        vector = torch.zeros(SIZE, requires_grad=True)
        vector.grad = grad
        optimizer = torch.optim.Adam([vector], lr=1e-4, fused=fused)

        def theirs(optimizer: torch.optim.Adam = optimizer, vector: Tensor = vector) -> None:
            optimizer.step()
            with torch.no_grad():
                vector.mul_(vector * signs > 0)

        torches[name] = theirs
    taken = alternate({"siftmasks": ours, **torches}, repeats=9)
    fastest = min(statistics.median(taken[name]) for name in torches)
    seconds = {f"{name}_seconds": summary(values) for name, values in taken.items()}
    moved = SIZE * (24 + 3 * 4)  # three states read and written; gradient and base read, weight written
    median = statistics.median(taken["siftmasks"])
    return {"weights": SIZE, **seconds, "times_faster": fastest / median, "gb_per_second": moved / median / 1e9}


def apply_mask() -> dict[str, Any]:
    """Serve 2^25 bfloat16 weights of one task, against `unpackbits`, multiply and add in torch.

    Both write into a tensor that is there, as a live model's is. Torch gets the signed, scaled ledger for nothing, as float32 in memory;
    ours makes signs and scale as it goes.
    """
    from siftmasks.ops.apply_mask import apply_mask as serve

    generator = np.random.default_rng(0)
    base = (torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    total = torch.from_numpy(generator.integers(0, 60 * 255, SIZE, dtype=np.uint16))
    bits = torch.from_numpy(generator.integers(0, 256, SIZE // 8, dtype=np.uint8))
    tasks = 60
    signed = total.float() * (STEP / tasks) * random.signs(0, "weight", SIZE)

    served, buffer, expected = torch.empty_like(base), torch.empty(SIZE), torch.empty_like(base)

    def ours() -> None:
        serve(base, total, bits, key=KEY, step=STEP, scale=1 / tasks, out=served)

    def theirs() -> None:
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little"))
        torch.mul(signed, mask, out=buffer)
        expected.copy_(buffer.add_(base))

    ours(), theirs()
    assert torch.equal(served, expected)
    taken = alternate({"siftmasks": ours, "torch": theirs}, repeats=9)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "weights": SIZE,
        "siftmasks_seconds": summary(taken["siftmasks"]),
        "torch_seconds": summary(taken["torch"]),
        "times_faster": medians["torch"] / medians["siftmasks"],
        "gb_per_second": SIZE * (2 + 2 + 2 + 1 / 8) / medians["siftmasks"] / 1e9,
    }


def forget_one_of_64() -> dict[str, Any]:
    """Forget one of 64 tasks, against central fine-tuning on the other 63 for as many epochs in batches of one task's size."""
    from siftmasks.examples import Example
    from siftmasks.models import load_trainee
    from siftmasks.settings import SiftSettings
    from siftmasks.store import Store

    settings = SiftSettings(learning_rate=1e-3, steps=20, threads=2)
    generator = np.random.default_rng(0)
    letters = np.array([*ALPHABET])

    def text(length: int) -> str:
        return "".join(generator.choice(letters, length))

    tasks = {
        f"user-{task:02d}": [Example(str(i), {"prompt": text(36), "completion": text(12)}) for i in range(10)]
        for task in range(64)
    }
    with tempfile.TemporaryDirectory(prefix="siftmasks-") as name:
        folder = Path(name)
        save_llama(folder / "base", layers=3, hidden_size=192)
        store = Store.init(folder / "store", folder / "base", settings=settings, max_tasks=255)
        trainee = load_trainee(folder / "base", settings)
        store.learn_many(tasks, model=trainee.model, loss=trainee.loss)
        gone, *kept = tasks
        forgetting = []
        for _ in range(3):
            given = {gone: tasks[gone]}
            forgetting.append(
                seconds_of(lambda given=given: store.forget([gone], given, model=trainee.model, loss=trainee.loss))
            )
            store.learn(gone, tasks[gone], model=trainee.model, loss=trainee.loss)
        weights = sum(tensor.numel() for tensor in trainee.model.parameters())
        torch.set_num_threads(settings.threads)
        model, loss = trainee.model, trainee.loss
        trained = [weight for name, weight in model.named_parameters() if name in store.config.tensors]
        model.train()

        def central() -> None:
            optimizer = torch.optim.Adam(trained, lr=settings.learning_rate)
            for _ in range(settings.steps):
                for task in kept:
                    optimizer.zero_grad()
                    loss(model, tasks[task]).backward()
                    optimizer.step()

        taken = seconds_of(central)
    steps = {"forget": settings.steps, "central": settings.steps * len(kept)}
    return {
        "weights": weights,
        "examples_per_task": 10,
        "forget_steps": steps["forget"],
        "central_steps": steps["central"],
        "forget_seconds": summary(forgetting),
        "central_seconds": taken,
        "central_steps_over_forget": steps["central"] / steps["forget"],
        "central_seconds_over_forget": taken / statistics.median(forgetting),
    }


LEDGER = """
import sys
from pathlib import Path
from siftmasks.store import Store
store = Store.open(sys.argv[1])
store.learn_many_from({path.name: path for path in sorted(Path(sys.argv[2]).iterdir())[: int(sys.argv[3])]})
"""


def ledger_of_64() -> dict[str, Any]:
    """Add 64 checkpoints to a store (policy archive), against mergekit's linear merge of the same 64; whole processes."""
    from siftmasks.settings import SiftSettings
    from siftmasks.store import Store

    with tempfile.TemporaryDirectory(prefix="siftmasks-") as name:
        folder = Path(name)
        save_llama(folder / "base", layers=6, hidden_size=512, dtype=torch.bfloat16)
        (folder / "tasks").mkdir()
        for task in range(64):
            model = tiny_llama(vocab_size=64, hidden_size=512, layers=6, heads=8, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(task)
            with torch.no_grad():
                for name_, weight in model.named_parameters():
                    if "embed_tokens" not in name_:
                        weight += (torch.randn(weight.shape, generator=generator) * 2e-3).to(weight.dtype)
            shutil.copytree(folder / "base", folder / "tasks" / f"task-{task:02d}")
            model.save_pretrained(folder / "tasks" / f"task-{task:02d}")
        recipe = folder / "recipe.yml"
        models = [{"model": str(path), "parameters": {"weight": 1 / 64}} for path in sorted((folder / "tasks").iterdir())]
        recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))  # JSON is YAML
        settings = SiftSettings(learning_rate=1e-3, steps=20)

        def ours(tasks: int) -> tuple[float, int]:
            shutil.rmtree(folder / "store", ignore_errors=True)
            Store.init(folder / "store", folder / "base", settings=settings, max_tasks=64, policy="archive")
            return run([sys.executable, "-c", LEDGER, folder / "store", folder / "tasks", tasks])

        def theirs() -> tuple[float, int]:
            shutil.rmtree(folder / "merged", ignore_errors=True)
            return run([BIN / "mergekit-yaml", recipe, folder / "merged"])

        ours(64), theirs()  # compiled code and file caches are warm for both from here on
        few, many, merged = [], [], []
        for _ in range(3):
            few.append(ours(8))
            many.append(ours(64))
            merged.append(theirs())
        size = (folder / "base" / "model.safetensors").stat().st_size
    medians = [statistics.median(wall for wall, _ in values) for values in (many, merged)]
    return {
        "bytes_each": size,
        "siftmasks_seconds": summary([wall for wall, _ in many]),
        "mergekit_seconds": summary([wall for wall, _ in merged]),
        "times_faster_than_mergekit": medians[1] / medians[0],
        "siftmasks_peak_rss_mb": max(peak for _, peak in many) / 1e6,
        "siftmasks_peak_rss_mb_of_8": max(peak for _, peak in few) / 1e6,
        "mergekit_peak_rss_mb": max(peak for _, peak in merged) / 1e6,
    }


def sift_adam_on_gpu() -> list[dict[str, Any]]:
    """One fused step on 2^28 weights as a share of the bandwidth of a copy, and against the reference's bits."""
    from siftmasks.ops.sift_adam import reference
    from siftmasks.ops.sift_adam import sift_adam as step

    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        base = (torch.randn(2**28, device="cuda") * 0.02).to(dtype)
        grad = (torch.randn(2**28, device="cuda") * 1e-3).to(dtype)
        options = {"key": KEY, "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3}
        states = [[torch.full((2**28,), value, device="cuda") for value in (1e-4, 1e-4, 1e-6)] for _ in range(2)]
        weights = [base.clone() for _ in range(2)]
        step(weights[0], base, *states[0], grad, **options)
        reference.sift_adam(weights[1], base, *states[1], grad, **options)
        same = all(torch.equal(a, b) for a, b in zip([weights[0], *states[0]], [weights[1], *states[1]], strict=True))
        moved = 2**28 * (24 + 3 * dtype.itemsize)
        rate = moved / bench(lambda w=weights[0], b=base, s=states[0], g=grad, o=options: step(w, b, *s, g, **o)) / 1e6
        copy = copy_rate()
        name = str(dtype).removeprefix("torch.")
        rows.append(
            {"dtype": name, "gb_per_second": rate, "copy_gb_per_second": copy, "share_of_copy": rate / copy, "bit_equal": same}
        )
    return rows


def apply_mask_on_gpu() -> dict[str, Any]:
    """Serving 2^28 bfloat16 weights as a share of the bandwidth of a copy, and against the reference's bits."""
    from siftmasks.ops.apply_mask import apply_mask as serve
    from siftmasks.ops.apply_mask import reference

    base = (torch.randn(2**28, device="cuda") * 0.02).bfloat16()
    total = torch.randint(0, 15_000, (2**28,), device="cuda").to(torch.uint16)
    bits = torch.randint(0, 256, (2**25,), device="cuda", dtype=torch.uint8)
    options: dict[str, Any] = {"key": KEY, "step": STEP, "scale": 1 / 60}
    same = torch.equal(
        serve(base, total, bits, **options), reference.apply_mask(base, total, bits, **options, dtype=base.dtype)
    )
    rate = 2**28 * (6 + 1 / 8) / bench(lambda: serve(base, total, bits, **options)) / 1e6
    copy = copy_rate()
    return {"gb_per_second": rate, "copy_gb_per_second": copy, "share_of_copy": rate / copy, "bit_equal": same}


def copy_rate() -> float:
    """GB/s of copying 1 GiB, read and write counted."""
    source = torch.empty(2**28, device="cuda")
    out = torch.empty_like(source)
    return 2 * source.nbytes / bench(lambda: out.copy_(source)) / 1e6


def bench(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(work)


def alternate(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one unmeasured round."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds_of(work))
    return taken


def save_llama(folder: Path, *, layers: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
    tiny_llama(vocab_size=64, hidden_size=hidden_size, layers=layers, heads=8, dtype=dtype).save_pretrained(folder)
    character_tokenizer(ALPHABET).save_pretrained(folder)


if __name__ == "__main__":
    main()
