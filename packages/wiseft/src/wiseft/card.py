"""What stands beside merged weights: the files of LATE, a recipe that a machine can repeat and a card that a person can read."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.record import write_atomically, write_json
from wiseft.plan import read_json

RECIPE = "wiseft.json"


@dataclass(frozen=True)
class Named:
    """An input: its part in the merge, what the user called it, and the open checkpoint."""

    role: str
    given: str
    checkpoint: Checkpoint


def write_card(
    folder: Path,
    place: Path,
    method: Mapping[str, str],
    sources: Sequence[Named],
    seen: Sequence[str],
    options: Mapping[str, Any],
    digest: str,
) -> None:
    """Write `wiseft.json` (the recipe with its digests, which `wiseft verify` repeats) and a model card in README.md.

    `place` is where `folder` will be published; the recipe holds the way from there to each source. `method` has the keys method, formula
    and citation; `seen` the digest of each source, `digest` that of the result.
    """
    described = []
    for one, used in zip(sources, seen, strict=True):
        near = os.path.relpath(one.checkpoint.path.resolve(), place.resolve())
        described.append({"role": one.role, "source": one.given, "path": near, "digest": used})
    write_json(folder / RECIPE, {**method, "sources": described, "options": dict(options), "digest": digest})
    table = "\n".join(f"| {one['role']} | `{one['source']}` | `{one['digest']}` |" for one in described)
    chosen = {key: value for key, value in options.items() if value is not None}
    card = f"""---
library_name: transformers
tags: [merge, wiseft]
---
# Merged weights

{method["method"]}: `{method["formula"]}`, computed in float64 and rounded once to nearest even.

| | checkpoint | digest of the bytes that were used |
|---|---|---|
{table}

Options: `{json.dumps(chosen)}`. Digest of these weights: `{digest}`.
A digest of a checkpoint is the SHA-256 of one line `name dtype shape xxh3-128` per tensor, sorted by name.

`wiseft verify` on this folder repeats the merge from `{RECIPE}` and compares every byte.
Method: {method["citation"]}.
"""
    write_atomically(folder / "README.md", card)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that `write_card` left in a folder."""
    recipe = read_json(folder / RECIPE)
    if recipe is None:
        several = sorted(path.parent.name for path in folder.glob(f"*/{RECIPE}"))
        hint = f"verify {', '.join(several)} in it" if several else "it was not written by wiseft"
        raise UserError(f"{folder} has no {RECIPE}: {hint}")
    sources = recipe.get("sources")
    whole = isinstance(sources, list) and all(
        isinstance(source, dict) and all(isinstance(source.get(key), str) for key in ("role", "source", "path", "digest"))
        for source in sources
    )
    if not whole or not isinstance(recipe.get("options"), dict) or not isinstance(recipe.get("digest"), str):
        raise UserError(f"{folder / RECIPE} is not as wiseft wrote it: merge again")
    return recipe


def check_overwrite(out: Path, overwrite: bool) -> None:
    """An existing `out` needs `overwrite`, and must be what an earlier merge wrote: nothing else is deleted."""
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists: choose another --out or pass --overwrite")
    if out.is_dir() and not (out / RECIPE).is_file() and not all((part / RECIPE).is_file() for part in out.iterdir()):
        raise UserError(
            f"{out} was not written by wiseft, so --overwrite does not replace it: remove it or choose another --out"
        )
