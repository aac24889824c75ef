"""What a merge will do with every tensor, decided from the headers alone."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmcore.checkpoint import Checkpoint, TensorInfo, shards_like
from lmcore.errors import UserError

Missing = Literal["late", "early", "error"]
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EARLY, LATE = 0, 1
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MIXABLE = ("BF16", "F16", "F32", "F64")
_FLOATING = (*_MIXABLE, "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64")
_VOCABULARY_ROWS = re.compile(
    r"embed|wte|word_emb|lm_head|embed_out|output_layer|decoder\.(weight|bias)$|(^|\.)output\.weight$|shared\."
)


@dataclass(frozen=True)
class Step:
    """One tensor of the output: its first `mixed` elements are interpolated (row-major, so whole leading rows); the rest is copied.

    `deltas` has the weight of EARLY in each output (of a soup: the weight of each source); `rest` is the number of the source that the
    rest comes from: of a merge, 0 is EARLY and 1 is LATE.
    """

    target: TensorInfo
    deltas: tuple[float, ...]
    mixed: int
    rest: int


@dataclass(frozen=True)
class Plan:
    """All steps, the shards they go to, and what the user should know before they run."""

    steps: tuple[Step, ...]
    shards: Mapping[str, Sequence[TensorInfo]]
    warnings: tuple[str, ...]

    def summary(self) -> dict[str, int]:
        """Tensors and bytes: what will be read, mixed, copied and written into each output."""
        written = sum(step.target.nbytes for step in self.steps)
        mixed = [step for step in self.steps if step.mixed]
        return {
            "tensors": len(self.steps),
            "tensors_interpolated": len(mixed),
            "weights_interpolated": sum(step.mixed for step in mixed),
            "tensors_copied": len(self.steps) - len(mixed),
            "bytes_per_output": written,
        }


def plan(
    early: Checkpoint,
    late: Checkpoint,
    deltas: Sequence[float],
    *,
    module_deltas: Mapping[str, float] | None = None,
    missing: Missing = "error",
    dtype: str | None = None,
) -> Plan:
    """Match the tensors of two checkpoints by name and say what becomes of each.

    The first regex of `module_deltas` that `re.search` finds in a tensor's name replaces every delta for it. A tensor that one checkpoint
    lacks is an error, or follows LATE (only-in-LATE copied, only-in-EARLY left out) or EARLY (the reverse) as `missing` says. Integers come
    from LATE. Of embeddings and heads with different numbers of rows the shared rows are interpolated, the rest is copied from LATE.

    Raises: `UserError` for different architectures, quantised weights, shapes that do not match, unknown names, a bad regex or delta.
    """
    deltas = [check_delta(delta) for delta in deltas]
    rules = [(_regex(pattern), check_delta(value)) for pattern, value in (module_deltas or {}).items()]
    _check_configs(early, late)
    _check_names(early, late, missing)
    warnings = _renamed_tokens(early, late)
    used = (*deltas, *(value for _, value in rules))
    warnings += [f"delta {delta:g} is outside [0, 1]: this extrapolates" for delta in used if not 0 <= delta <= 1]
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in late.tensors):
            raise UserError(f"no tensor of {late.path} matches the regex {pattern.pattern!r} of the module deltas")
    shards = shards_like(late, DTYPE_NAMES[dtype] if dtype else None)
    if missing == "early":
        only_early = [name for name in early.tensors if name not in late.tensors]
        for file, tensors in shards.items():
            shards[file] = [tensor for tensor in tensors if tensor.name in early.tensors]
        kept = [info for tensors in shards_like(early, DTYPE_NAMES[dtype] if dtype else None).values() for info in tensors]
        shards[list(shards)[-1]] += [info for info in kept if info.name in only_early]
    steps = []
    for target in (tensor for tensors in shards.values() for tensor in tensors):
        chosen = next((value for pattern, value in rules if pattern.search(target.name)), None)
        each = tuple(deltas) if chosen is None else (chosen,) * len(deltas)
        steps.append(_step(target, each, early, late, warnings))
    return Plan(tuple(steps), shards, tuple(warnings))


def _step(target: TensorInfo, deltas: tuple[float, ...], early: Checkpoint, late: Checkpoint, warnings: list[str]) -> Step:
    name = target.name
    if name not in late.tensors:
        return Step(target, deltas, mixed=0, rest=EARLY)
    a, b = early.tensors.get(name), late.tensors[name]
    if a is None:
        return Step(target, deltas, mixed=0, rest=LATE)
    if a.dtype not in _FLOATING and b.dtype not in _FLOATING:
        if a.shape != b.shape:
            raise UserError(f"tensor {name} has shape {a.shape} in {a.file} and {b.shape} in {b.file}")
        return Step(target, deltas, mixed=0, rest=LATE)
    for info in (a, b):
        if info.dtype not in _MIXABLE:
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}, which cannot be interpolated: de-quantise it first")
    if a.shape == b.shape:
        return Step(target, deltas, mixed=b.size, rest=LATE)
    if len(a.shape) != len(b.shape) or not b.shape or a.shape[1:] != b.shape[1:] or not _VOCABULARY_ROWS.search(name):
        raise UserError(
            f"tensor {name} has shape {a.shape} in {a.file} and {b.shape} in {b.file}: these are different architectures"
        )
    shared = min(a.shape[0], b.shape[0])
    rest = f"the other {b.shape[0] - shared} are copied from LATE" if b.shape[0] > shared else "EARLY's other rows are left out"
    warnings.append(f"{name} has {a.shape[0]} rows in EARLY, {b.shape[0]} in LATE: {shared} are interpolated, {rest}")
    return Step(target, deltas, mixed=shared * (b.size // b.shape[0]) if b.shape[0] else 0, rest=LATE)


def check_delta(delta: Any) -> float:
    """`delta` as a finite float, or a `UserError`."""
    try:
        value = float(delta)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UserError(f"delta {delta!r} is not a finite number")
    return value


def read_module_deltas(path: Path) -> dict[str, float]:
    """Read a JSON file of regex -> delta, in the order of the file. A regex that is there twice is an error."""
    rules = read_json(path, pairs=_each_once)
    if not rules or not all(type(value) in (int, float) for value in rules.values()):
        raise UserError(f'{path}: expected one object of regex -> delta such as {{"mlp": 0.3}}')
    return rules


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    patterns = [pattern for pattern, _ in pairs]
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(f"the regex {pattern!r} is there twice")
    return dict(pairs)


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"the regex {pattern!r} of the module deltas is not valid: {error}") from None


def _check_names(early: Checkpoint, late: Checkpoint, missing: Missing) -> None:
    for checkpoint in (early, late):
        if any("lora_A" in name for name in checkpoint.tensors):
            where = "merge two adapters by their folders, or first fold this one into its base (peft's merge_and_unload)"
            raise UserError(f"{checkpoint.path} holds LoRA factors: {where}")
    heads = [any(_HEAD.search(name) for name in checkpoint.tensors) for checkpoint in (early, late)]
    if heads[0] != heads[1]:
        with_head, without = (early, late) if heads[0] else (late, early)
        raise UserError(
            f"{without.path} ties its head to the embedding, {with_head.path} has one of its own: save both alike first"
        )
    if missing != "error":
        if not early.tensors.keys() & late.tensors.keys():
            raise UserError(f"{early.path} and {late.path} have no tensor name in common")
        return
    for name in late.tensors.keys() - early.tensors.keys():
        raise UserError(f"{early.path} has no tensor {name}: pass --missing late (or early) to say which checkpoint to follow")
    for name in early.tensors.keys() - late.tensors.keys():
        raise UserError(f"{late.path} has no tensor {name}: pass --missing late (or early) to say which checkpoint to follow")


def _check_configs(early: Checkpoint, late: Checkpoint) -> None:
    configs = [read_model_json(checkpoint, "config.json") for checkpoint in (early, late)]
    for checkpoint, config in zip((early, late), configs, strict=True):
        quantised = config and config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
            raise UserError(f"{checkpoint.path} is quantised ({method}): merge the un-quantised weights")
    kinds = [config.get("model_type") for config in configs if config]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(
            f"{early.path} is a {kinds[0]} model, {late.path} a {kinds[1]} model: only one architecture can be merged"
        )
    ids = [_token_ids(checkpoint) for checkpoint in (early, late)]
    for token in ids[0].keys() & ids[1].keys():
        if ids[0][token] != ids[1][token]:
            raise UserError(
                f"mismatched vocabularies: token {token!r} is row {ids[0][token]} of {early.path}, row {ids[1][token]} of {late.path}"
            )


def _renamed_tokens(early: Checkpoint, late: Checkpoint) -> list[str]:
    """A warning if a row means one token in EARLY and another in LATE (such as a reserved one that was put to use)."""
    tokens = [{row: token for token, row in _token_ids(checkpoint).items()} for checkpoint in (early, late)]
    renamed = sorted(row for row in tokens[0].keys() & tokens[1].keys() if tokens[0][row] != tokens[1][row])
    if not renamed:
        return []
    first = renamed[0]
    return [f"{len(renamed)} rows have another token in LATE: row {first} is {tokens[0][first]!r}, then {tokens[1][first]!r}"]


def _token_ids(checkpoint: Checkpoint) -> dict[str, int]:
    tokenizer = read_model_json(checkpoint, "tokenizer.json") or {}
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece[0]: row for row, piece in enumerate(vocabulary)}
        return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: tokenizer.json is not one of the tokenizers library ({error!r})") from None


def read_model_json(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """A JSON object of the model that a checkpoint belongs to, None where there is none."""
    return read_json(checkpoint.folder / name) if checkpoint.folder else None


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any] | None:
    """A JSON object from a file, None where there is no such file; `pairs` checks the keys, raising `ValueError`."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
