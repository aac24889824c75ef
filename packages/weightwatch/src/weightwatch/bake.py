"""Write a model whose weights do without chosen directions: steering that needs no hooks."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lmcore.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, copy_model_files, shards_like
from lmcore.errors import UserError
from lmcore.record import published, write_atomically, write_json
from weightwatch.directions import Directions
from weightwatch.pair import Pair, norm_scale
from weightwatch.places import check_place
from weightwatch.residual_writers import Part, Writer

RECORD = "weightwatch.json"
Mode = Literal["remove", "revert"]
_BYTES = 1 << 24  # copied at a time


def bake(
    directions: Directions, post: str | os.PathLike[str], out: str | os.PathLike[str], labels: Iterable[str], *, mode: Mode = "revert",
    base: str | os.PathLike[str] | None = None, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a copy of `post` without the directions `labels`, a plain Hugging Face folder with a card.

    - "revert": the writer that a direction came from takes back what the fine-tune wrote along it,
      W ← W - U Uᵀ (W - W_base), U the chosen directions of that writer. Needs `base`. What the base wrote along them stays.
    - "remove": neither writer of the direction's block writes along it any more, W ← (I - Q Qᵀ) W and b ← (I - Q Qᵀ) b, Q an orthonormal
      basis of the chosen directions of that block. What earlier blocks wrote there stays in the stream, which is less than steering
      takes out; in exchange nothing has to fire.

    Where a norm follows the writer (Gemma 2, OLMo 2, BERT), U and Q are meant behind it: W ← D⁻¹ (I - Q Qᵀ) D W with its gain D; the norm
    then also rescales what is left. Arithmetic is float32, rounded once to the dtype of the tensor. Memory: a few tensors. The folder
    appears whole or not at all.

    Returns: what weightwatch.json has: for each edited tensor `moved`, |W' - W| / |W|, and `lost`, the share of |W' - W|² that rounding
    took; and `out`.
    Raises: `UserError` for unknown or no labels, for directions of another architecture, without a base in mode "revert", for a norm with a
    gain of zero, and if `out` exists without `overwrite`, is no earlier bake or lies in an input.
    """
    chosen = sorted(set(labels))
    known = {f"{one.label}_u{i}": (one.layer, one.kind, i) for one in directions.writers for i in range(len(one.sigma))}
    if not chosen or not known.keys() >= set(chosen):
        fault = f"no direction is named {', '.join(sorted(set(chosen) - known.keys()))}" if chosen else "no direction was named"
        raise UserError(f"{fault}: they are {directions.writers[0].label}_u0 to {directions.labels[-1]}")
    if (base is None) == (mode == "revert"):
        raise UserError("mode revert takes back what changed since the base, so it needs --base, and mode remove does not")
    place = Path(out)
    check_place(place, [Path(source) for source in (post, base) if source is not None], overwrite, RECORD)
    with Pair.open(base, post) as pair:
        edits = _edits(directions, [known[label] for label in chosen], pair, mode)
        checkpoint, reports = pair.post, {}
        with published(place, overwrite=overwrite) as folder:
            copy_model_files(checkpoint, folder, leave=(RECORD,))
            index = checkpoint.index and dict(checkpoint.index.get("metadata") or {})
            shards = shards_like(checkpoint)
            with CheckpointWriter(folder, shards, metadata=checkpoint.metadata, index_metadata=index) as writer:
                for name, info in checkpoint.tensors.items():
                    if name in edits:
                        edited, reports[name] = _edited(checkpoint, name, edits[name])
                        writer.write(name, 0, edited.reshape(-1).view(torch.uint8).numpy())
                    else:
                        _copy(checkpoint, info, writer)
            record = {
                "mode": mode,
                "directions": chosen,
                "of": directions.source,
                "digest": directions.digest,
                "tensors": reports,
            }
            write_json(folder / RECORD, record)
            write_atomically(folder / "README.md", _card(record))
    return {**record, "out": str(place)}


@dataclass(frozen=True)
class _Edit:
    """A change of one part of a tensor, given as float32 [hidden size, inputs]."""

    part: Part
    change: Callable[[Tensor], Tensor]


def _edits(directions: Directions, chosen: Iterable[tuple[int, str, int]], pair: Pair, mode: Mode) -> dict[str, list[_Edit]]:
    """Changes by the name of the tensor."""
    rows: dict[tuple[int, str | None], list[Tensor]] = {}
    for layer, kind, i in chosen:
        one = next(one for one in directions.writers if (one.layer, one.kind) == (layer, kind))
        rows.setdefault((layer, kind if mode == "revert" else None), []).append(one.vectors[i])
    keys = [(writer.layer, writer.kind if mode == "revert" else None) for writer in pair.writers.writers]
    if not rows.keys() <= {*keys}:
        raise UserError(f"{pair.post.path} lacks blocks that the directions belong to")
    edits: dict[str, list[_Edit]] = {}
    for number, (key, writer) in enumerate(zip(keys, pair.writers.writers, strict=True)):
        if key not in rows:
            continue
        vectors = torch.stack(rows[key])
        if vectors.shape[1] != writer.shape[0]:
            raise UserError(
                f"directions have {vectors.shape[1]} entries, {writer.name} of {pair.post.path} has {writer.shape[0]} rows"
            )
        basis, gain = torch.linalg.qr(vectors.mT).Q, _gain(pair.post, writer)
        difference = pair.difference(number).matrix if mode == "revert" else None
        column = 0
        for part in writer.parts:
            delta = None if difference is None else difference[:, column : column + part.shape[1]]
            edits.setdefault(part.tensor, []).append(_Edit(part, _along(basis, gain, delta)))
            column += part.shape[1]
            bias = part.tensor.removesuffix("weight") + "bias"
            if mode == "remove" and bias in pair.post.tensors and not part.fused:
                edits[bias] = [_Edit(Part(bias, (writer.shape[0], 1)), _along(basis, gain, None))]
    return edits


def _along(basis: Tensor, gain: Tensor | None, delta: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What is taken from a weight W: D⁻¹ Q Qᵀ Δ, or D⁻¹ Q Qᵀ D W without a Δ (which has D in it already)."""

    def change(weight: Tensor) -> Tensor:
        source = delta if delta is not None else weight if gain is None else weight * gain[:, None]
        taken = basis @ (basis.mT @ source)
        return taken if gain is None else taken / gain[:, None]

    return change


def _gain(checkpoint: Checkpoint, writer: Writer) -> Tensor | None:
    gain = norm_scale(checkpoint, writer)
    if gain is not None and bool((gain == 0).any()):
        raise UserError(
            f"{writer.norms[0]} of {checkpoint.path} has gains of zero: directions behind it cannot be moved into {writer.name}"
        )
    return gain


def _edited(checkpoint: Checkpoint, name: str, edits: Iterable[_Edit]) -> tuple[Tensor, dict[str, float]]:
    before = checkpoint.tensor(name)
    after = before.float()  # a copy, unless it is float32: then the tensor is ours anyway
    old = after.clone()
    for edit in edits:
        view = after[edit.part.expert] if edit.part.fused else after
        view = view[:, None] if view.ndim == 1 else view.mT if edit.part.transposed else view
        view -= edit.change(view)
    rounded = after.to(before.dtype)
    if not bool(rounded.isfinite().all()):
        raise UserError(f"{name} would hold values that {before.dtype} does not: bake a float32 copy of the model")
    moved = (after - old).square().sum(dtype=torch.float64)
    lost = (rounded.float() - after).square().sum(dtype=torch.float64)
    return rounded, {
        "moved": float((moved / old.square().sum(dtype=torch.float64).clamp(min=1e-300)).sqrt()),
        "lost": float(lost / moved) if moved else 0.0,
    }


def _copy(checkpoint: Checkpoint, info: TensorInfo, writer: CheckpointWriter) -> None:
    for start in range(0, info.nbytes, _BYTES):
        writer.write(info.name, start, checkpoint.read(info.name, start, min(start + _BYTES, info.nbytes)))


def _card(record: Mapping[str, Any]) -> str:
    how = {
        "revert": "what the fine-tune wrote along them was taken back from the matrices that they come from",
        "remove": "the attention and MLP of their blocks no longer write along them",
    }[record["mode"]]
    rows = "\n".join(f"| {name} | {one['moved']:.3g} | {one['lost']:.3g} |" for name, one in record["tensors"].items())
    return f"""---
library_name: transformers
tags: [weightwatch]
---
# A model without {len(record["directions"])} directions of its fine-tune

Directions {", ".join(f"`{label}`" for label in record["directions"])} of `{record["of"].get("post", "")}`: {how} (mode {record["mode"]}).

| tensor | relative change | share of the change lost to rounding |
|---|---|---|
{rows}

`{RECORD}` has the same for machines.
Method: Zhong and Raghunathan 2025, "Watch the Weights: Unsupervised monitoring and control of fine-tuned LLMs" (arXiv 2508.00161).
"""
