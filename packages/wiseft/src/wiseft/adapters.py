"""LoRA adapters: interpolate the product BA, not its factors.

An adapter adds `s * B A` to a weight, s = lora_alpha / r (or / sqrt(r), rsLoRA). Interpolating A and B apart would mix in cross terms
`B_early A_late`, which neither fine-tune ever saw. The interpolated product has rank at most r_early + r_late and is written exactly, as

    delta s_e B_e A_e + (1 - delta) s_l B_l A_l = [delta s_e B_e, (1 - delta) s_l B_l] [A_e; A_l].

The A factors are copied (rounded, where LATE's dtype is narrower than EARLY's) and each entry of B is rounded once, to the dtype of LATE.
With `rank`, the product is truncated to its largest singular values, by a QR of each factor and an SVD of the small core; the share of
the squared norm that is lost is reported.
Source of LoRA: Hu et al. 2021 (arXiv 2106.09685); of the rsLoRA scale: Kalajdzievski 2023 (arXiv 2312.03732).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lmcore.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, copy_model_files
from lmcore.errors import UserError
from lmcore.record import published, write_json
from wiseft.card import RECIPE, Named, write_card
from wiseft.ops.lerp.numpy import BITS, decode, encode
from wiseft.plan import read_model_json
from wiseft.stream import digest_line, total_digest

METHOD = {
    "method": "WiSE-FT of LoRA adapters",
    "formula": "delta * s B A of early + (1 - delta) * s B A of late",
    "citation": 'Dang et al. 2025, "Weight Ensembling Improves Reasoning in Language Models" (arXiv 2504.10478)',
}
_FACTOR = re.compile(r"(.*\.)lora_(embedding_)?A(\.weight)?$")


def merge_adapters(
    sources: Sequence[Named],
    out: Path,
    names: Sequence[str],
    deltas: Sequence[float],
    *,
    rank: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write one adapter per delta into `out / name`, each with scale 1 (lora_alpha = r); see the module for the formula.

    Modules that an adapter saves whole (`modules_to_save`) are interpolated as weights. The two adapters may have different ranks.

    Raises: `UserError` for adapters of different modules, DoRA, LoRA biases, or one input that is no adapter.
    """
    early, late = (source.checkpoint for source in sources)
    config = _check_configs(early, late)
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} must be at least 1")
    pairs, others = _match(early, late)
    result = {
        "tensors": len(late.tensors),
        "tensors_interpolated": len(late.tensors),
        "weights_interpolated": sum(info.size for info in late.tensors.values()),
        "tensors_copied": 0,
        "bytes_per_output": sum(info.nbytes for info in (*late.tensors.values(), *early.tensors.values())),
        "outputs": [str(out / name) for name in names],
        "warnings": [],
    }
    if dry_run:
        return result
    lost = 0.0
    with published(out, overwrite=overwrite) as folder:
        for name, delta in zip(names, deltas, strict=True):
            place = folder / name
            place.mkdir(exist_ok=True)
            tensors = {}
            for a_name, b_name in pairs:
                a, b, share = _product(early, late, a_name, b_name, delta, rank)
                tensors[a_name], tensors[b_name] = a, b
                lost = max(lost, share)
            for other in others:
                ends = [_read(checkpoint, other) for checkpoint in (early, late)]
                tensors[other] = ends[1] + delta * (ends[0] - ends[1])
            digest = _write(place, late, tensors)
            ranks = {_module(a_name): tensors[a_name].shape[0] for a_name, _ in pairs}
            copy_model_files(late, place, leave=[RECIPE])
            write_json(place / "adapter_config.json", config | _scale_one(ranks))
            write_card(
                place, out / name, METHOD, sources, [_digest(early), _digest(late)], {"delta": delta, "rank": rank}, digest
            )
    return {**result, "lost_share": lost}


def verify_adapters(merged: Checkpoint, sources: Sequence[Checkpoint], recipe: dict[str, Any]) -> dict[str, Any]:
    """Repeat an adapter merge in memory and compare it with `merged`, tensor by tensor."""
    early, late = sources
    for checkpoint, source in zip(sources, recipe["sources"], strict=True):
        if _digest(checkpoint) != source["digest"]:
            raise UserError(f"{checkpoint.path} is not the {source['role']} adapter that was merged: its digest differs")
    delta, rank = recipe["options"]["delta"], recipe["options"]["rank"]
    pairs, others = _match(early, late)
    for a_name, b_name in pairs:
        a, b, _ = _product(early, late, a_name, b_name, delta, rank)
        _compare(merged, late, a_name, a)
        _compare(merged, late, b_name, b)
    for other in others:
        ends = [_read(checkpoint, other) for checkpoint in (early, late)]
        _compare(merged, late, other, ends[1] + delta * (ends[0] - ends[1]))
    extra = merged.tensors.keys() - late.tensors.keys()
    if extra:
        raise UserError(f"{merged.path}: tensor {min(extra)} is not what its recipe gives")
    expected = _check_configs(early, late) | _scale_one({_module(a): merged.tensors[a].shape[0] for a, _ in pairs})
    if read_model_json(merged, "adapter_config.json") != expected or _digest(merged) != recipe["digest"]:
        raise UserError(
            f"{merged.path}: adapter_config.json or the digest in the recipe is not what the recipe gives: one was edited"
        )
    total = sum(info.nbytes for info in merged.tensors.values())
    return {"tensors": len(merged.tensors), "bytes": total, "equal": True, "digest": _digest(merged)}


def _product(
    early: Checkpoint, late: Checkpoint, a_name: str, b_name: str, delta: float, rank: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The factors [A_e; A_l] and [delta s_e B_e, (1 - delta) s_l B_l] in float64, and the share of the squared norm that is lost."""
    a = np.concatenate([_read(checkpoint, a_name) for checkpoint in (early, late)], axis=0)
    factors = [delta * _scaling(early, a_name), (1 - delta) * _scaling(late, a_name)]
    b = np.concatenate([f * _read(c, b_name) for f, c in zip(factors, (early, late), strict=True)], axis=1)
    if rank is None or rank >= a.shape[0]:
        return a, b, 0.0
    left, left_core = np.linalg.qr(b.reshape(b.shape[0], -1))
    right, right_core = np.linalg.qr(a.reshape(a.shape[0], -1).T)
    u, sigma, vt = np.linalg.svd(left_core @ right_core.T)
    total = float(np.sum(sigma**2))
    root = np.sqrt(sigma[:rank])
    new_a = ((root[:, None] * vt[:rank]) @ right.T).reshape(rank, *a.shape[1:])
    new_b = ((left @ u[:, :rank]) * root).reshape(b.shape[0], rank, *b.shape[2:])
    return new_a, new_b, float(np.sum(sigma[rank:] ** 2)) / total if total else 0.0


def _match(early: Checkpoint, late: Checkpoint) -> tuple[list[tuple[str, str]], list[str]]:
    """The (A, B) pairs of names and the remaining names, after checking that both adapters have the same modules."""
    different = early.tensors.keys() ^ late.tensors.keys()
    if different:
        raise UserError(f"{early.path} and {late.path} adapt different modules: {min(different)} is in one of them only")
    pairs, others = [], []
    for name in late.tensors:
        found = _FACTOR.match(name)
        if found:
            pairs.append((name, name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")))
        elif "lora_" not in name:
            others.append(name)
    for checkpoint in (early, late):
        for a, b in pairs:
            if b not in checkpoint.tensors:
                raise UserError(f"{checkpoint.path} has tensor {a} but no {b}")
            ranks = checkpoint.tensors[a].shape[0], checkpoint.tensors[b].shape[1]
            if ranks[0] != ranks[1]:
                raise UserError(f"{checkpoint.path}: tensor {a} has rank {ranks[0]}, {b} has rank {ranks[1]}")
    factors = {name for pair in pairs for name in pair}
    for name, info in late.tensors.items():
        if name not in factors and name not in others:
            raise UserError(f"{info.file}: tensor {name} is neither LoRA factor A nor B: only plain LoRA can be interpolated")
        if info.dtype not in BITS or early.tensors[name].dtype not in BITS:
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}, which cannot be interpolated")
        shapes = (early.tensors[name].shape, info.shape)
        rank_axis = 0 if name in {a for a, _ in pairs} else 1 if name in factors else None
        if any(n != m for axis, (n, m) in enumerate(zip(*shapes, strict=False)) if axis != rank_axis) or len(shapes[0]) != len(
            shapes[1]
        ):
            raise UserError(f"tensor {name} has shape {shapes[0]} in {early.path} and {shapes[1]} in {late.path}")
    return pairs, others


def _check_configs(early: Checkpoint, late: Checkpoint) -> dict[str, Any]:
    configs = []
    for checkpoint in (early, late):
        config = read_model_json(checkpoint, "adapter_config.json")
        if config is None:
            raise UserError(f"{checkpoint.path} is no LoRA adapter (no adapter_config.json), the other input is")
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
            kind = (
                "DoRA" if config.get("use_dora") else "LoRA with biases" if config.get("lora_bias") else config.get("peft_type")
            )
            raise UserError(f"{checkpoint.path} is {kind}: only plain LoRA and rsLoRA can be interpolated")
        start, tokens = config.get("init_lora_weights"), config.get("trainable_token_indices")
        if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
            raise UserError(
                f"{checkpoint.path} was started by {start}, which changes the base model: convert it to plain LoRA first"
            )
        if tokens:
            raise UserError(
                f"{checkpoint.path} trains single tokens (trainable_token_indices): only plain LoRA can be interpolated"
            )
        if not isinstance(config.get("lora_alpha"), int | float):
            raise UserError(f"{checkpoint.path}: adapter_config.json has no lora_alpha")
        configs.append(config)
    bases = [config.get("base_model_name_or_path") for config in configs]
    if bases[0] != bases[1]:
        raise UserError(f"the adapters have different base models: {bases[0]} and {bases[1]}")
    return configs[1]


def _scaling(checkpoint: Checkpoint, a_name: str) -> float:
    """The factor s of one module, from the config with its per-module patterns and the rank of the factor itself."""
    config = read_model_json(checkpoint, "adapter_config.json") or {}
    rank = checkpoint.tensors[a_name].shape[0]
    module = _module(a_name)
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _scale_one(ranks: dict[str, int]) -> dict[str, Any]:
    """The entries of adapter_config.json that give scale lora_alpha / r = 1 at every module's own rank."""
    common = max(ranks.values(), default=1)
    odd = {f"{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
    entries = {"r": common, "lora_alpha": common, "rank_pattern": odd, "alpha_pattern": odd}
    return {**entries, "use_rslora": False, "init_lora_weights": True, "inference_mode": True}


def _module(a_name: str) -> str:
    found = _FACTOR.match(a_name)
    assert found is not None
    return found[1].removesuffix(".").removeprefix("base_model.model.")


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    values = np.empty(info.size)
    decode(checkpoint.read(name).view(BITS[info.dtype]), info.dtype, values)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"{info.file}: tensor {name} holds {values[at]} at element {at}")
    return values.reshape(info.shape)


def _rounded(late: Checkpoint, name: str, values: np.ndarray) -> np.ndarray:
    dtype = late.tensors[name].dtype
    data = np.empty(values.size, BITS[dtype])
    if encode(np.ascontiguousarray(values).reshape(-1), dtype, data):
        raise UserError(f"tensor {name} has values that {dtype} cannot hold: use adapters in a wider dtype")
    return data


def _write(place: Path, late: Checkpoint, tensors: dict[str, np.ndarray]) -> str:
    file = next(iter(late.metadata))
    specs = [TensorInfo(name, late.tensors[name].dtype, tuple(tensors[name].shape), place / file, 0) for name in late.tensors]
    with CheckpointWriter(place, {file: specs}, metadata=late.metadata) as writer:
        for name, values in tensors.items():
            writer.write(name, 0, _rounded(late, name, values))
    with Checkpoint.open(place / file) as written:
        return _digest(written)


def _compare(merged: Checkpoint, late: Checkpoint, name: str, values: np.ndarray) -> None:
    found = merged.tensors.get(name)
    if found is None or found.shape != values.shape or bytes(merged.read(name)) != _rounded(late, name, values).tobytes():
        raise UserError(f"{merged.path}: tensor {name} is not what its recipe gives")


def _digest(checkpoint: Checkpoint) -> str:
    lines = [digest_line(info, xxhash.xxh3_128(checkpoint.read(name).data)) for name, info in checkpoint.tensors.items()]
    return total_digest(lines)
