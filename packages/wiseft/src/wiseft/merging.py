"""Interpolate checkpoints on disk: two of them at one or several deltas, or a soup of many."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.checkpoint import Checkpoint, CheckpointWriter, copy_model_files, shards_like
from lmcore.errors import UserError
from lmcore.record import published
from wiseft import stream
from wiseft.card import RECIPE, Named, check_overwrite, write_card
from wiseft.ops.lerp.numpy import BITS
from wiseft.plan import DTYPE_NAMES, Missing, Plan, Step, check_delta, plan, read_model_json

Source = str | os.PathLike[str]
CITATION = 'Dang et al. 2025, "Weight Ensembling Improves Reasoning in Language Models" (arXiv 2504.10478)'
SOUP_CITATION = 'Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), the uniform soup where the weights are equal'


def merge(
    early: Source,
    late: Source,
    out: Source,
    *,
    delta: float | Sequence[float] = 0.5,
    module_deltas: Mapping[str, float] | None = None,
    missing: Missing = "error",
    dtype: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write `w = delta * early + (1 - delta) * late` for every weight: WiSE-FT of two checkpoints.

    Computed as `late + delta * (early - late)` in float64 and rounded once to nearest even (so delta 1 gives EARLY up to the float64
    rounding of that formula). `delta` is the weight of the EARLY
    checkpoint; several deltas read each input once and write `out/delta-0.30/` and so on. `module_deltas` maps a regex to the delta of the
    tensors whose name it finds. Integers, config, tokenizer and generation files come from LATE, and so does the dtype unless `dtype`
    (float32, bfloat16, float16) names another. `missing` and embeddings of different sizes: see `wiseft.plan.plan`. Two folders of LoRA
    adapters give an adapter, truncated to `rank` if that is given (see `wiseft.adapters`). `dry_run` returns the plan and writes nothing.
    Memory does not grow with the model; torch is not imported.

    >>> from lmcore.models import tiny_llama
    >>> folder = Path(tempfile.mkdtemp())
    >>> for seed, name in enumerate(["early", "late"]):
    ...     tiny_llama(vocab_size=16, seed=seed).save_pretrained(folder / name)
    >>> merge(folder / "early", folder / "late", folder / "half", delta=0.5)["tensors"]
    20

    Returns: counts of tensors and bytes, warnings, digests.
    Raises: `UserError` if the inputs do not match, hold NaN or give infinities, or `out` exists without `overwrite`.
    Source: Dang et al. 2025 (arXiv 2504.10478); Wortsman et al. 2021, eq. 1 (their alpha is 1 - delta).
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPE_NAMES)}")
    several = isinstance(delta, Sequence)
    deltas = [check_delta(value) for value in (delta if isinstance(delta, Sequence) else [delta])]
    names = [delta_name(value) for value in deltas] if several else [""]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"the deltas {deltas} must be at least one, and each another")
    with Checkpoint.open(early) as a, Checkpoint.open(late) as b:
        sources = [Named("early", str(early), a), Named("late", str(late), b)]
        _check_place(Path(out), (a, b), overwrite)
        if any(read_model_json(checkpoint, "adapter_config.json") for checkpoint in (a, b)):
            from wiseft.adapters import merge_adapters

            refused = {"module_deltas": module_deltas, "missing": missing != "error", "dtype": dtype}
            if any(refused.values()):
                raise UserError(f"adapters are merged without {', '.join(key for key, value in refused.items() if value)}")
            return merge_adapters(sources, Path(out), names, deltas, rank=rank, overwrite=overwrite, dry_run=dry_run)
        if rank is not None:
            raise UserError("rank is for LoRA adapters: these are whole checkpoints")
        todo = plan(a, b, deltas, module_deltas=module_deltas, missing=missing, dtype=dtype)
        for warning in todo.warnings:
            warnings.warn(warning, stacklevel=2)
        options = {"missing": missing, "dtype": dtype, "module_deltas": module_deltas and dict(module_deltas)}
        outputs = {name: {**options, "delta": value} for name, value in zip(names, deltas, strict=True)}
        result = {**todo.summary(), "outputs": [str(Path(out, name)) for name in names], "warnings": list(todo.warnings)}
        if dry_run:
            return result
        recipe = {"method": "WiSE-FT", "formula": "delta * early + (1 - delta) * late", "citation": CITATION}
        return {**result, "digests": _publish(todo, sources, stream.interpolate, Path(out), outputs, recipe, overwrite)}


def soup(
    checkpoints: Sequence[Source],
    out: Source,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Average checkpoints: `sum(weight * w) / sum(weight)` in float64, rounded once to nearest even; equal weights by default.

    Names and shapes must agree. Integers, config, tokenizer and dtype come from the last checkpoint, unless `dtype` names another.

    Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), the uniform soup.
    """
    factors = [1.0] * len(checkpoints) if weights is None else [float(weight) for weight in weights]
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPE_NAMES)}")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(source)) for source in checkpoints]
        todo = plan_soup(opened, factors, dtype)
        _check_place(Path(out), opened, overwrite)
        result = {**todo.summary(), "outputs": [str(out)], "warnings": []}
        if dry_run:
            return result
        sources = [Named(f"checkpoint {n}", str(s), c) for n, (s, c) in enumerate(zip(checkpoints, opened, strict=True))]
        outputs = {"": {"weights": factors, "dtype": dtype}}
        recipe = {"method": "Model soup", "formula": "sum(weight * w) / sum(weight)", "citation": SOUP_CITATION}
        return {**result, "digests": _publish(todo, sources, stream.average, Path(out), outputs, recipe, overwrite)}


def plan_soup(sources: Sequence[Checkpoint], weights: Sequence[float], dtype: str | None) -> Plan:
    """What a soup does with every tensor: the last checkpoint says which there are.

    Raises: `UserError` for fewer than two checkpoints, names or shapes that differ, and weights that are not finite or cancel.
    """
    if len(sources) < 2 or len(weights) != len(sources):
        counts = f"{len(sources)} and {len(weights)} were given"
        raise UserError(f"a soup takes two checkpoints or more and one weight for each: {counts}")
    if not abs(sum(weights)) > 1e-9 * sum(abs(weight) for weight in weights) < float("inf"):
        raise UserError(f"the weights of a soup must be finite and not sum to 0: {[*weights]}")
    for other in sources[:-1]:
        different = other.tensors.keys() ^ sources[-1].tensors.keys()
        if different:
            raise UserError(f"{other.path} and {sources[-1].path} differ in tensor {min(different)}: a soup needs equal names")
        matched = plan(other, sources[-1], [0.0])
        if matched.warnings:
            raise UserError(f"{other.path} does not fit {sources[-1].path}: {matched.warnings[0]}")
    shards = shards_like(sources[-1], DTYPE_NAMES[dtype] if dtype else None)
    targets = [target for tensors in shards.values() for target in tensors]
    last = len(sources) - 1
    steps = tuple(Step(target, tuple(weights), target.size if target.dtype in BITS else 0, rest=last) for target in targets)
    return Plan(steps, shards, ())


def delta_name(delta: float) -> str:
    """The folder of one delta among several: `delta-0.30`, with more digits only where two do not say it all.

    >>> delta_name(0.3), delta_name(0.125)
    ('delta-0.30', 'delta-0.125')
    """
    short = f"{delta:.2f}"
    return f"delta-{short if float(short) == delta else repr(float(delta))}"


def _publish(
    todo: Plan,
    sources: Sequence[Named],
    combine: stream.Combine,
    out: Path,
    outputs: Mapping[str, dict[str, Any]],
    recipe: dict[str, Any],
    overwrite: bool,
) -> dict[str, list[str]]:
    """Publish `out` with weights, model files and card in one folder per output ("" is `out` itself), named with its options."""
    late = sources[-1].checkpoint
    with published(out, overwrite=overwrite) as folder:
        with contextlib.ExitStack() as stack:
            writers = []
            for name, options in outputs.items():
                (folder / name).mkdir(exist_ok=True)
                copy_model_files(late, folder / name, options["dtype"], leave=[RECIPE])
                index = (late.index or {}).get("metadata")
                index = index if isinstance(index, dict) else {} if late.index else None
                writer = CheckpointWriter(folder / name, todo.shards, metadata=late.metadata, index_metadata=index)
                writers.append(stack.enter_context(writer))
            digests = stream.run(todo.steps, [source.checkpoint for source in sources], writers, combine)
        for (name, options), digest in zip(outputs.items(), digests["outputs"], strict=True):
            write_card(folder / name, out / name, recipe, sources, digests["sources"], options, digest)
    return digests


def _check_place(out: Path, sources: Sequence[Checkpoint], overwrite: bool) -> None:
    """Inputs are never written to: the output may not be or hold a folder with their bytes, nor lie inside one that was given."""
    place = out.resolve()
    for source in sources:
        folders = {info.file.resolve().parent for info in source.tensors.values()} | {source.path.resolve()}
        inside = source.path.is_dir() and source.path.resolve() in place.parents
        if inside or any(place == folder or place in folder.parents for folder in folders):
            raise UserError(f"--out {out} would write into the input {source.path}: choose another folder")
    check_overwrite(out, overwrite)
