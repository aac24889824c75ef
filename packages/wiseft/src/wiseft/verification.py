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
from wiseft.merging import Source, plan_soup
from wiseft.plan import Step, check_delta, plan


def verify(out: Source, sources: Sequence[Source] | None = None) -> dict[str, Any]:
    """Compute the merge in `out` again from the recipe in its `wiseft.json`, without writing, and compare.

    `sources` replaces the places that the recipe names, in its order, for inputs that have moved.

    Returns: the number of tensors and bytes compared and the digests.
    Raises: `UserError` if an input is not the one that was merged, or naming the first tensor that differs.
    """
    folder = Path(out)
    recipe = read_recipe(folder)
    recorded = recipe["sources"]
    places = list(sources) if sources else [_place(folder, source) for source in recorded]
    if len(places) != len(recorded):
        raise UserError(f"{folder} was merged from {len(recorded)} checkpoints, {len(places)} were given")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(place)) for place in places]
        merged = stack.enter_context(Checkpoint.open(folder))
        if "rank" in recipe["options"]:
            from wiseft.adapters import verify_adapters

            return verify_adapters(merged, opened, recipe)
        steps, combine = _repeat(folder, opened, recipe["options"])
        comparison = _Comparison(merged, steps)
        digests = stream.run(steps, opened, [comparison], combine)
    for source, place, digest in zip(recipe["sources"], places, digests["sources"], strict=True):
        if digest != source["digest"]:
            raise UserError(f"{place} is not the {source['role']} checkpoint that was merged into {folder}: its digest differs")
    if comparison.different:
        raise UserError(f"{folder}: tensor {min(comparison.different)} is not what its recipe gives")
    if digests["outputs"][0] != recipe["digest"]:
        raise UserError(f"{folder}: the weights are what the recipe gives, but not the digest in it: the recipe was edited")
    return {
        "tensors": len(steps),
        "bytes": sum(step.target.nbytes for step in steps),
        "equal": True,
        "digest": digests["outputs"][0],
    }


def _place(folder: Path, source: dict[str, str]) -> str:
    """Where a recorded source is: by its way from the output, else by the name that was given, on the Hub only if it was there."""
    if (folder / source["path"]).exists():
        return str(folder / source["path"])
    if Path(source["source"]).exists() or "snapshots" in Path(source["path"]).parts:
        return source["source"]
    raise UserError(f"the {source['role']} checkpoint {source['source']} of {folder} has moved: name it with --sources")


def _repeat(folder: Path, opened: Sequence[Checkpoint], options: dict[str, Any]) -> tuple[Sequence[Step], stream.Combine]:
    """The steps and the arithmetic of a recipe; a `UserError` if it was edited into one that wiseft does not write."""
    try:
        if "weights" in options:
            return plan_soup(opened, [float(weight) for weight in options["weights"]], options["dtype"]).steps, stream.average
        early, late = opened
        chosen = {key: options[key] for key in ("module_deltas", "missing", "dtype")}
        return plan(early, late, [check_delta(options["delta"])], **chosen).steps, stream.interpolate
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: the options in its recipe are not as wiseft wrote them ({error!r})") from None


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
