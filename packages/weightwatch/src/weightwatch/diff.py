"""What a fine-tune changed, read from the weights alone: where, how concentrated, and which words it writes."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lmcore.checkpoint import DTYPES, Checkpoint, TensorInfo
from lmcore.errors import UserError
from weightwatch.directions import Directions
from weightwatch.lens import Decode, Words, words
from weightwatch.pair import CHUNK, FLOATS, Pair

Grade = Literal["identical", "below rounding", "marked", "low rank", "spread out"]
GRADES: Mapping[Grade, str] = {
    "identical": "No weight differs.",
    "below rounding": "Weights differ, but no direction is larger than what rounding makes: no difference above rounding.",
    "marked": "A single direction holds most of the difference of a matrix that changed much. Over-trained triggers and edits leave such "
    "marks: read its words and watch it.",
    "low rank": "The difference of every matrix lies in a few directions, as that of a merged adapter does.",
    "spread out": "The difference is spread over many directions, as after ordinary fine-tuning.",
}
MARK_SHARE, MARK_SIZE = 0.5, 2.0
"""A mark holds more than this share of its matrix's squared norm, and its σ is this many times the median of all matrices' first."""
LOW_RANK_SHARE = 0.9
"""Share of the squared norm that the k directions hold in the median matrix of a fine-tune of low rank."""


@dataclass(frozen=True)
class Changed:
    """A tensor that does not write to the residual stream, or is no matrix, and differs."""

    name: str
    relative: float
    """|post - base| / |base|, Frobenius norms."""
    changed: float
    """Share of its entries that differ."""


@dataclass(frozen=True)
class Comparison:
    """A fine-tune as `weightwatch diff` shows it."""

    directions: Directions
    words: Mapping[str, Words]
    """By the label of a direction above the noise edge; empty where the model has no unembedding."""
    others: tuple[Changed, ...]
    """Largest relative difference first."""
    equal: int
    """Number of tensors that hold the same numbers."""
    grade: Grade
    warnings: tuple[str, ...]
    """What to know before trusting it: those of the directions, and what could not be compared or read."""

    def as_json(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON values."""
        writers = []
        for one in self.directions.writers:
            shown = {name: value for name, value in vars(one).items() if name != "vectors"}
            found = {f"{one.label}_u{i}": value for i, value in enumerate(one.sigma[: one.signal])}
            lines = [
                {"label": label, "sigma": value, **(asdict(self.words[label]) if label in self.words else {})}
                for label, value in found.items()
            ]
            writers.append(
                {**shown, "label": one.label, "signal": one.signal, "stable_rank": one.stable_rank, "directions": lines}
            )
        return {
            "grade": self.grade, "meaning": GRADES[self.grade], "source": self.directions.source, "k": self.directions.k,
            "warnings": [*self.warnings], "writers": writers, "others": [asdict(one) for one in self.others],
            "equal": self.equal,
        }  # fmt: skip


def diff(base: str, post: str, *, k: int = 20, top: int = 8, seed: int = 0, progress: bool = False) -> Comparison:
    """Compare two checkpoints of one architecture without building a model or reading any data.

    The residual writers are decomposed (`Directions.of`), the words of each direction above the noise edge are read from the unembedding
    of `post` (`words`, the `top` at each end), and all other tensors are compared entry by entry. Tensors of one model alone or of other
    shapes, and an unembedding that is not found, are given as warnings and kept in `Comparison.warnings`. Both files are read once, a few
    rows at a time; memory: a few matrices.

    Raises: `UserError` as `Directions.of`.
    """
    directions = Directions.of(base, post, k, seed=seed, progress=progress)
    with Pair.open(base, post) as pair:
        writing = {
            part.tensor for side in (pair.base_writers, pair.writers) for writer in side.writers for part in writer.parts
        }
        names = {name for side in (pair.base, pair.post) if side for name in side.tensors} - writing
        compared = {name: _compared(name, pair) for name in sorted(names)}
        found = [one for one in compared.values() if one]
        others = sorted((one for one in found if one.changed), key=lambda one: -one.relative)
        notes = []
        if apart := [name for name, one in compared.items() if one is None]:
            why = "are in one model alone, of other shapes or no floating-point numbers"
            notes.append(f"{len(apart)} tensors, such as {apart[0]}, {why}: they are not compared")
        labels = [f"{one.label}_u{i}" for one in directions.writers for i in range(one.signal)]
        vectors = [one.vectors[i] for one in directions.writers for i in range(one.signal)]
        try:
            read = words(torch.stack(vectors), pair.post, _decode(pair.post), top=top) if vectors else []
        except UserError as error:  # an encoder without a head has no words
            read = []
            notes.append(str(error))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    equal = sum(not one.changed for one in found) + sum(not one.changed for one in directions.writers)
    named = dict(zip(labels, read, strict=True)) if read else {}
    judged = grade(directions, others=len(others) + len(apart))
    return Comparison(directions, named, tuple(others), equal, judged, (*directions.warnings, *notes))


def grade(directions: Directions, *, others: int = 0) -> Grade:
    """Say in a word what the singular values of the writers look like, `others` being the number of other tensors that differ.

    See `GRADES` for the meanings, `MARK_SHARE`, `MARK_SIZE` and `LOW_RANK_SHARE` for the rules.

    A grade describes, it does not judge: a spread-out fine-tune can hide a backdoor, and a mark can be an honest edit.
    """
    differ = [one for one in directions.writers if one.changed]
    if not differ:
        return "below rounding" if others else "identical"
    signal = [one for one in differ if one.signal]
    if not signal:
        return "below rounding"
    first = sorted(one.sigma[0] for one in differ)
    typical = first[len(first) // 2]
    if any(one.sigma[0] ** 2 > MARK_SHARE * one.norm**2 and one.sigma[0] > MARK_SIZE * typical for one in signal):
        return "marked"
    if len(signal) == 1 and signal[0].sigma[0] ** 2 > MARK_SHARE * signal[0].norm ** 2:
        return "marked"
    held = sorted(sum(value**2 for value in one.sigma) / one.norm**2 for one in differ)
    return "low rank" if held[len(held) // 2] > LOW_RANK_SHARE else "spread out"


def _compared(name: str, pair: Pair) -> Changed | None:
    """Compare one tensor, a piece at a time; None where one side has none of its name and shape, or integers that differ."""
    assert pair.base is not None
    before, after = (side.tensors.get(name) for side in (pair.base, pair.post))
    if before is None or after is None or before.shape != after.shape:
        return None
    pieces = [(start, min(start + CHUNK, after.size)) for start in range(0, after.size, CHUNK)]
    if before.dtype == after.dtype and all(_equal(name, pair.base, pair.post, start, stop) for start, stop in pieces):
        return Changed(name, 0.0, 0.0)
    if not {before.dtype, after.dtype} <= FLOATS.keys():
        return None
    different, old_squares, squares = 0, 0.0, 0.0
    for start, stop in pieces:
        old, new = (_piece(side, info, start, stop) for side, info in ((pair.base, before), (pair.post, after)))
        for side, values in ((pair.base, old), (pair.post, new)):
            if not values.isfinite().all():
                raise UserError(f"{side.tensors[name].file}: tensor {name} holds NaN or infinity")
        different += int((old != new).count_nonzero())
        old_squares += float(old.square().sum(dtype=torch.float64))
        squares += float((new - old).square().sum(dtype=torch.float64))
    relative = math.sqrt(squares / old_squares) if old_squares else 1.0
    return Changed(name, relative if different else 0.0, different / max(1, after.size))


def _equal(name: str, base: Checkpoint, post: Checkpoint, start: int, stop: int) -> bool:
    size = DTYPES[post.tensors[name].dtype]
    old, new = (side.read(name, start * size, stop * size) for side in (base, post))
    return np.array_equal(old, new)


def _piece(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int) -> Tensor:
    size = DTYPES[info.dtype]
    return torch.from_numpy(checkpoint.read(info.name, start * size, stop * size)).view(FLOATS[info.dtype]).float()


def _decode(checkpoint: Checkpoint) -> Decode | None:
    """The tokenizer of a model folder; the library itself where its file is there, as importing transformers takes seconds."""
    folder = checkpoint.folder
    if folder is not None and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json")).decode
        except Exception as error:  # the library raises no narrower class
            raise UserError(
                f"{folder / 'tokenizer.json'} is no tokenizer ({error}): there are no words, mend it or take it away"
            ) from None
    if folder is not None and ((folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.model").is_file()):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        return lambda ids: str(tokenizer.decode(ids))
    return None
