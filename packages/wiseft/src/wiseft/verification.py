"""Repeat a merge from its card and compare every byte."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from wiseft import stream
from wiseft.card import read_recipe
from wiseft.merging import Source
from wiseft.ops.lerp.numba import BITS
from wiseft.plan import Step, plan


def verify(out: Source, sources: Sequence[Source] | None = None) -> dict[str, Any]:
    """Compute the merge in `out` again from the recipe in its `wiseft.json`, without writing, and compare.

    `sources` replaces the places that the recipe names, in its order, for inputs that have moved.

    Returns: the number of tensors and bytes compared and the digests.
    Raises: `UserError` if an input is not the one that was merged, or naming the first tensor that differs.
    """
    folder = Path(out)
    recipe = read_recipe(folder)
    places = list(sources) if sources else [source["source"] for source in recipe["sources"]]
    if len(places) != len(recipe["sources"]):
        raise UserError(f"{folder} was merged from {len(recipe['sources'])} checkpoints, {len(places)} were given")
    options = recipe["options"]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(place)) for place in places]
        merged = stack.enter_context(Checkpoint.open(folder))
        if "rank" in options:
            from wiseft.adapters import verify_adapters

            return verify_adapters(merged, opened, recipe)
        if "weights" in options:
            weights = tuple(options["weights"])
            steps = tuple(
                Step(target, weights, target.size if target.dtype in BITS else 0, rest=len(opened) - 1)
                for target in merged.tensors.values()
            )
            combine: stream.Combine = stream.average
        else:
            chosen = {key: options[key] for key in ("module_deltas", "missing", "dtype")}
            steps = plan(opened[0], opened[1], [options["delta"]], **chosen).steps
            combine = stream.interpolate
        comparison = _Comparison(merged, steps)
        digests = stream.run(steps, opened, [comparison], combine)
    for source, place, digest in zip(recipe["sources"], places, digests["sources"], strict=True):
        if digest != source["digest"]:
            raise UserError(f"{place} is not the {source['role']} checkpoint that was merged into {folder}: its digest differs")
    if comparison.different:
        raise UserError(f"{folder}: tensor {min(comparison.different)} is not what its recipe gives")
    return {
        "tensors": len(steps),
        "bytes": sum(step.target.nbytes for step in steps),
        "equal": True,
        "digest": digests["outputs"][0],
    }


class _Comparison:
    """A sink that compares instead of writing."""

    def __init__(self, merged: Checkpoint, steps: Sequence[Step]):
        self.merged = merged
        self.different: set[str] = set()
        expected = {step.target.name: (step.target.dtype, step.target.shape) for step in steps}
        found = {name: (info.dtype, info.shape) for name, info in merged.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(f"{merged.path}: tensor {name} is {found.get(name)}, its recipe gives {expected.get(name)}")

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        if not np.array_equal(self.merged.read(name, start, start + data.nbytes), data.view(np.uint8)):
            self.different.add(name)
