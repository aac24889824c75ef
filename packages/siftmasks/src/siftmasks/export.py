"""Export a served model as a plain Hugging Face folder, and tell what of the delta its dtype does not hold."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lmcore.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, copy_model_files, shards_like
from lmcore.errors import UserError
from lmcore.record import published, write_atomically, write_json
from siftmasks.canonical import room_for
from siftmasks.rounding_loss import Report, RoundingLoss
from siftmasks.served import Scale, Served
from siftmasks.store import Store

RECORD = "siftmasks.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(
    store: Store, task: str | None, out: str | os.PathLike[str], *, scale: Scale = "mean", dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a folder that transformers loads, with the weights `store.weights(task, scale)`; task None is the model without a mask.

    Names, shards, config, tokenizer and generation files are the base's, and so is the dtype of each tensor, unless `dtype` (float32,
    bfloat16, float16) takes its place in all floating-point ones. A model card and `siftmasks.json` name the base, the store's digest, the
    task and its scale, and tell what rounding does to the delta (see `RoundingLoss`) in the exported dtype and in each of the three.
    Every file is a function of the base's folder, the store's digest and the arguments: stores of equal digests give equal files. Memory: a
    few tensors. The folder appears whole or not at all; what a killed export hid beside it, the next one to the same place clears.

    >>> from lmcore.models import tiny_llama
    >>> folder = Path(tempfile.mkdtemp())
    >>> tiny_llama(vocab_size=16, layers=1).save_pretrained(folder / "base")
    >>> store = Store.init(folder / "store", folder / "base")
    >>> export(store, None, folder / "exported")["tensors"]
    11

    Returns: what `siftmasks.json` has, and `out`, `tensors`, `bytes` and `warnings` (where more than half of the energy is lost).
    Raises: `UserError`, with nothing written, for an unknown task, scale or dtype; if the base has moved; if `out` exists without
    `overwrite`, is no earlier export, or lies in the store or the base; if a weight is too large for `dtype`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}")
    snapshot = store.snapshot()
    if task is not None:
        snapshot.require([task])
    served, base, place = Served(snapshot, scale), store.base(), Path(out)
    _check_place(place, [store.path, base.path], overwrite)
    shards, loss = shards_like(base, DTYPES[dtype] if dtype else None), RoundingLoss()
    index = base.index and {**(base.index.get("metadata") or {})}
    with room_for(place), published(place, overwrite=overwrite) as folder:
        copy_model_files(base, folder, dtype, leave=["wiseft.json", RECORD])
        with CheckpointWriter(folder, shards, metadata=base.metadata, index_metadata=index) as writer:
            targets = [target for tensors in shards.values() for target in tensors]
            for target, tensor in _tensors(targets, base, served, task, loss):
                writer.write(target.name, 0, tensor.reshape(-1).view(torch.uint8).numpy())
        record = {
            "task": task, "scale": scale, "dtype": dtype, "mode": snapshot.config.settings.mode, "tasks": snapshot.manifest.tasks,
            "base": snapshot.config.base, "store": snapshot.manifest.digest,
        }  # fmt: skip
        lost = loss.report()
        write_json(folder / RECORD, record | {"loss": lost})
        write_atomically(folder / "README.md", _card(record, lost))
    warning = _warning(lost)
    if warning:
        warnings.warn(warning, stacklevel=2)
    size = {"tensors": len(targets), "bytes": sum(target.nbytes for target in targets)}
    return {**record, "loss": lost, "out": str(place), **size, "warnings": [warning] if warning else []}


def _tensors(
    targets: list[TensorInfo], base: Checkpoint, served: Served, task: str | None, loss: RoundingLoss
) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Yield each tensor as it is written."""
    for target in tqdm(targets, desc="export", unit="tensor", file=sys.stderr, disable=None, leave=False):
        weight = base.tensor(target.name)
        if target.name in served.snapshot.config.tensors:
            ledger, bits = served.ledger(target.name), served.bits(target.name, task)
            exact, delta = (
                served.tensor(target.name, start, ledger, bits, dtype=torch.float32)
                for start in (weight, torch.zeros(weight.shape))
            )
            exported = exact.to(_TORCH[target.dtype])  # the bits of `Store.weights`, which rounds to float32 first, too
            loss.add(weight, delta, exported)
        else:
            exported = weight if target.dtype == base.tensors[target.name].dtype else weight.to(_TORCH[target.dtype])
        if exported.dtype != weight.dtype and not exported.isfinite().all():
            raise UserError(f"{target.name} has weights that {target.dtype} does not hold: choose another dtype")
        yield target, exported


def _card(record: dict[str, Any], lost: Report) -> str:
    """The model card: what a person wants to know of these weights."""
    task = (
        "no task: the model without a mask"
        if record["task"] is None
        else f"task `{json.dumps(record['task'], ensure_ascii=False)}`"
    )
    rows = "\n".join(f"| {name} | {_share(of['unchanged'])} | {_share(of['energy_lost'])} |" for name, of in lost.items())
    return f"""---
library_name: transformers
tags: [merge, siftmasks]
---
# Merged weights of {record["tasks"]} tasks, served for {task}

| | |
|---|---|
| scale | {record["scale"]} |
| mode | {record["mode"]} |
| dtype | {record["dtype"] or "that of the base, tensor by tensor"} |
| SHA-256 of the base | `{record["base"]}` |
| digest of the store | `{record["store"]}` |

What rounding does to the delta, the difference between these weights and the base, here and in other dtypes:

| dtype | of the weights with a delta, those that stay as in the base | of the delta's squared length, lost |
|---|---|---|
{rows}

`siftmasks.json` has the same for machines. Once a task is forgotten, exports made before still have it.
Method: SIFT-Masks, Kuo et al. 2025, "Exact Unlearning of Finetuning Data via Model Merging at Scale" (arXiv 2504.04626).
"""


def _share(value: float | None) -> str:
    return "overflows" if value is None else f"{100 * value:.4g} %"


def _warning(report: Report) -> str | None:
    lost = report["exported"]["energy_lost"]
    if lost is None or lost <= 0.5:  # what overflows is not exported
        return None
    return f"rounding to this dtype loses {_share(lost)} of the delta's squared length: export with --dtype float32"


def _check_place(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Nothing is written into what is read, and nothing replaced but an earlier export."""
    place = out.resolve()
    for path in (path.resolve() for path in inputs):
        if path == place or path in place.parents or place in path.parents:
            raise UserError(f"--out {out} would write into {path}: choose another folder")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists: choose another --out or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file()):
        raise UserError(f"{out} is no earlier export, so --overwrite does not replace it: remove it or choose another --out")


_TORCH = {name: getattr(torch, dtype) for dtype, name in DTYPES.items()}
