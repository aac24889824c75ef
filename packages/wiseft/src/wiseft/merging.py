"""Interpolate checkpoints on disk: two of them at one or several deltas, or a soup of many."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.checkpoint import Checkpoint, CheckpointWriter, shards_like
from lmcore.errors import UserError
from lmcore.record import published
from wiseft import stream
from wiseft.card import Named, copy_model_files, write_card
from wiseft.ops.lerp.numba import BITS
from wiseft.plan import DTYPE_NAMES, Missing, Plan, Step, plan

Source = str | os.PathLike[str]


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

    Computed as `late + delta * (early - late)` in float64 and rounded once to nearest even. `delta` is the weight of the EARLY
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
    Raises: `UserError` if the inputs do not match, hold NaN, or `out` exists without `overwrite`.
    Source: Dang et al. 2025 (arXiv 2504.10478); Wortsman et al. 2021, eq. 1 (their alpha is 1 - delta).
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPE_NAMES)}")
    several = not isinstance(delta, int | float)
    deltas = list(delta) if isinstance(delta, Sequence) else [delta]
    _check_place(out, [early, late])
    with Checkpoint.open(early) as a, Checkpoint.open(late) as b:
        names = [delta_name(value) for value in deltas] if several else [""]
        sources = [Named("early", str(early), a), Named("late", str(late), b)]
        if any((checkpoint.path / "adapter_config.json").is_file() for checkpoint in (a, b)):
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
        recipe = {"method": "WiSE-FT", "formula": "delta * early + (1 - delta) * late"}
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
    if len(checkpoints) < 2 or len(factors) != len(checkpoints):
        raise UserError(
            f"a soup takes two checkpoints or more and one weight for each: {len(checkpoints)} and {len(factors)} were given"
        )
    if not all(abs(factor) < float("inf") for factor in factors) or sum(factors) == 0:
        raise UserError(f"the weights of a soup must be finite and not sum to 0: {factors}")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPE_NAMES)}")
    _check_place(out, checkpoints)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(source)) for source in checkpoints]
        for other in opened[:-1]:
            matched = plan(other, opened[-1], [0.0])
            if matched.warnings:
                raise UserError(f"{other.path} does not fit {opened[-1].path}: {matched.warnings[0]}")
        shards = shards_like(opened[-1], DTYPE_NAMES[dtype] if dtype else None)
        targets = [target for tensors in shards.values() for target in tensors]
        last = len(opened) - 1
        steps = tuple(Step(target, tuple(factors), target.size if target.dtype in BITS else 0, rest=last) for target in targets)
        todo = Plan(steps, shards, ())
        result = {**todo.summary(), "outputs": [str(out)], "warnings": []}
        if dry_run:
            return result
        sources = [Named(f"checkpoint {n}", str(s), c) for n, (s, c) in enumerate(zip(checkpoints, opened, strict=True))]
        outputs = {"": {"weights": factors, "dtype": dtype}}
        recipe = {"method": "Model soup", "formula": "sum(weight * w) / sum(weight)"}
        return {**result, "digests": _publish(todo, sources, stream.average, Path(out), outputs, recipe, overwrite)}


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
                copy_model_files(late, folder / name, options["dtype"])
                index = late.index["metadata"] if late.index else None
                writer = CheckpointWriter(folder / name, todo.shards, metadata=late.metadata, index_metadata=index)
                writers.append(stack.enter_context(writer))
            digests = stream.run(todo.steps, [source.checkpoint for source in sources], writers, combine)
        for (name, options), digest in zip(outputs.items(), digests["outputs"], strict=True):
            write_card(folder / name, recipe, sources, digests["sources"], options, digest)
    return digests


def _check_place(out: Source, sources: Sequence[Source]) -> None:
    """Inputs are never written to: the output may not be one of them, lie inside one, or hold one."""
    place = Path(out).resolve()
    for source in sources:
        path = Path(source).resolve()
        if path.exists() and (place == path or path in place.parents or place in path.parents):
            raise UserError(f"--out {out} would write into the input {source}: choose another folder")
