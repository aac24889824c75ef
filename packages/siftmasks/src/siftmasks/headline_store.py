"""A store of a real tiny Llama that learns, forgets and exports: is it the one that never learned what it forgot?"""

import random
import tempfile
from pathlib import Path
from typing import Any

from lmcore.models import tiny_llama
from lmcore.text import character_tokenizer
from siftmasks.examples import Example
from siftmasks.export import export
from siftmasks.models import load_trainee
from siftmasks.settings import SiftSettings
from siftmasks.store import Store

_LETTERS = "abcdefghijklmnopqrstuvwxyz "


def forget_in_a_store(seed: int) -> dict[str, Any]:
    """Learn five tasks and forget two of them; learn the other three alone, in another order; compare all files of stores and exports.

    Returns: `seed`, `files` (how many were compared), `different_files`, `weights` and the `digest` of both.
    """
    draw = random.Random(seed)

    def text(length: int) -> str:
        return "".join(draw.choices(_LETTERS, k=length))

    tasks = {
        name: [Example(f"{name}/{i}", {"prompt": text(12), "completion": text(6)}) for i in range(8)] for name in "abcde"
    }  # fmt: skip
    settings = SiftSettings(learning_rate=1e-3, steps=5, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tiny_llama(vocab_size=64, hidden_size=64, layers=2, seed=seed).save_pretrained(place / "base")
        character_tokenizer(_LETTERS).save_pretrained(place / "base")
        trainee = load_trainee(place / "base", settings)
        how: dict[str, Any] = {"model": trainee.model, "loss": trainee.loss}
        stores = [Store.init(place / name, place / "base", settings=settings) for name in ("forgot", "never")]
        for task in "abcde":
            stores[0].learn(task, tasks[task], **how)
        stores[0].forget(["b", "d"], {task: tasks[task] for task in "bd"}, **how)
        for task in "eca":
            stores[1].learn(task, tasks[task], **how)
        for store in stores:
            for served in ("a", "c", "e", None):
                export(store, served, store.path.with_name(f"{store.path.name}-exports") / (served or "maskless"))
        pairs = [(_files(place / f"forgot{which}"), _files(place / f"never{which}")) for which in ("", "-exports")]
        names = [(left, right, name) for left, right in pairs for name in sorted({*left, *right})]
        different = sum(left.get(name) != right.get(name) for left, right, name in names)
        weights = sum(parameter.numel() for parameter in trainee.model.parameters())
        return {
            "seed": seed, "files": len(names), "different_files": different, "weights": weights, "digest": stores[0].digest(),
        }  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative path, without the commitments, which are keyed by random numbers."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "sidecar" not in path.parts}
