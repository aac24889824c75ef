"""Two checkpoints of one architecture side by side: what must agree is checked before any weight is read, then matrices are subtracted."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcore.checkpoint import DTYPES, Checkpoint
from lmcore.errors import UserError
from weightwatch.noise import rounding, rounding_variance
from weightwatch.ops.delta_gemm import delta_gemm
from weightwatch.ops.difference_sums import DifferenceSums, difference_sums
from weightwatch.residual_writers import Part, ResidualWriters, Writer, residual_writers

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 18
"""Weights of other tensors that are widened at a time."""
PIECE = 1 << 20
"""Weights of a residual writer that are subtracted at a time."""
LARGE = 1 << 22
"""Weights from which on a difference is multiplied without being formed: before, it fits the cache."""
Source = str | PathLike[str]


@dataclass(frozen=True, eq=False)
class Difference:
    """What a fine-tune did to one residual writer: Δ = G_post W_post - G_base W_base, as a matrix that is never formed.

    `difference @ right` and `difference.mT @ right` are its products; G is what the norms after the writer scale its rows by
    (`Writer.norms`). Held are the weights as they are stored, or where only one side has them, Δ = G_post W_post.
    """

    writer: Writer
    parts: tuple[tuple[Tensor | None, Tensor], ...]
    """Of each part, W_base and W_post [hidden size, inputs]."""
    gains: tuple[Tensor | None, Tensor | None]
    """The diagonals of G_base and G_post, float32 [hidden size], None where no norm follows."""

    @property
    def shape(self) -> tuple[int, int]:
        """[hidden size, inputs]."""
        return self.writer.shape

    @property
    def mT(self) -> "_Transposed":  # noqa: N802 (as tensors have it)
        """Its transpose, for products."""
        return _Transposed(self)

    def __matmul__(self, right: Tensor) -> Tensor:
        return self._times(right, transpose=False)

    @cached_property
    def matrix(self) -> Tensor:
        """Δ itself, float32 [hidden size, inputs]."""
        matrix = torch.empty(self.shape)
        for rows, columns, found in self._passed():
            matrix[rows, columns] = found.delta
        return matrix

    @cached_property
    def sums(self) -> "Sums":
        """Squares, variances and counts, in one pass."""
        rows, columns = torch.zeros(4, self.shape[0], dtype=torch.float64), torch.zeros(2, self.shape[1], dtype=torch.float64)
        changed, matrix = 0, None if self._pairs else torch.empty(self.shape)
        for here, across, found in self._passed():
            rows[:, here] += found.rows
            columns[:, across] += found.columns
            changed += found.changed
            if matrix is not None:
                if found.delta.shape == self.shape:
                    matrix = found.delta
                else:
                    matrix[here, across] = found.delta
        if matrix is not None:
            vars(self)["matrix"] = matrix  # which the products are going to need
        return Sums(rows[:3], columns[0], (rows[3], columns[1]), changed / max(1, math.prod(self.shape)))

    def rounding_variances(self) -> Tensor:
        """Variance of what rounding W_post to its dtype adds to each entry of Δ, float32 [hidden size, inputs]."""
        variances, gain = torch.empty(self.shape), self.gains[1]
        for rows, columns, _, post, how in self._pieces():
            variance = rounding_variance(post, how)
            variances[rows, columns] = variance if gain is None else variance * gain[rows, None] ** 2
        return variances

    def _times(self, right: Tensor, transpose: bool) -> Tensor:
        pairs, gain = self._pairs, self.gains[1]
        if not pairs:  # with vectors as rows the matrix is read in the order of memory
            return (right.mT @ (self.matrix if transpose else self.matrix.mT)).mT
        if transpose:
            scaled = right if gain is None else right * gain[:, None]
            return torch.cat([delta_gemm(base, post, scaled, transpose=True) for base, post in pairs])
        rows = right.split([post.shape[1] for _, post in pairs])
        product = torch.stack([delta_gemm(base, post, one) for (base, post), one in zip(pairs, rows, strict=True)]).sum(0)
        return product if gain is None else product * gain[:, None]

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The parts, if `delta_gemm` should do the products: Δ is large, and both sides have the same gain and dtypes that it takes."""
        before, after = self.gains
        equal = before is after if before is None or after is None else torch.equal(before, after)
        pairs = [
            (base, post) for base, post in self.parts if base is not None and torch.float64 not in (base.dtype, post.dtype)
        ]
        return pairs if equal and len(pairs) == len(self.parts) and math.prod(self.shape) > LARGE else []

    def _passed(self) -> Iterator[tuple[slice, slice, DifferenceSums]]:
        """What one pass over the weights tells, about `PIECE` of them at a time: which rows and columns, and their sums."""
        for rows, columns, base, post, how in self._pieces():
            gains = tuple(None if gain is None else gain[rows] for gain in self.gains)
            yield rows, columns, difference_sums(base, post, (gains[0], gains[1]), how)

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor | None, Tensor, tuple[float, float]]]:
        """About `PIECE` weights at a time: which rows and columns, W_base and W_post, and how W_post was rounded (`rounding`)."""
        first = 0
        for base, post in self.parts:
            d, m = post.shape
            how = rounding(post)
            across = post.stride(0) < post.stride(1)  # stored transposed: cut along the inputs
            length, other = (m, d) if across else (d, m)
            step = max(1, PIECE // max(1, other))
            for start in range(0, length, step):
                cut = slice(start, min(start + step, length))
                rows, inside = (slice(0, d), cut) if across else (cut, slice(0, m))
                columns = slice(first + inside.start, first + inside.stop)
                yield rows, columns, None if base is None else base[rows, inside], post[rows, inside], how
            first += m


@dataclass(frozen=True)
class _Transposed:
    difference: Difference

    def __matmul__(self, right: Tensor) -> Tensor:
        return self.difference._times(right, transpose=True)


@dataclass(frozen=True)
class Sums:
    """What one pass over a difference tells."""

    rows: Tensor
    """Squared norm of each row of G_base W_base, of G_post W_post and of Δ: float64 [3, hidden size]."""
    columns: Tensor
    """Squared norm of each column of Δ: float64 [inputs]."""
    variances: tuple[Tensor, Tensor]
    """Sums of `Difference.rounding_variances` over each row and over each column: float64 [hidden size] and [inputs]."""
    changed: float
    """Share of the entries of Δ that are not zero."""


@dataclass(frozen=True)
class Pair(AbstractContextManager["Pair"]):
    """A base checkpoint and one fine-tuned from it, or one checkpoint alone (`base` None: its weights count as the difference)."""

    base: Checkpoint | None
    post: Checkpoint
    base_writers: ResidualWriters
    writers: ResidualWriters
    warnings: tuple[str, ...]

    @classmethod
    def open(cls, base: Source | None, post: Source) -> "Pair":
        """Open both (`Checkpoint.open`) and compare names, shapes and dtypes.

        Matrices that write to the residual stream must agree in number and shape; other tensors of different shapes, such as those of a
        resized vocabulary, are a warning. Experts may be stored one by one in one checkpoint and in one tensor in the other.
        Raises: `UserError` for adapters, quantised weights and different architectures; it names file and tensor.
        """
        opened = [_open(source) for source in (base, post) if source is not None]
        found = [_writers_of(checkpoint) for checkpoint in opened]
        warnings = _compare(opened, found) if base is not None else []
        if found[-1].detected:
            warnings.append(f"model type {found[-1].model_type} is unknown: writers were detected by shapes and names")
        for checkpoint, one in zip(opened, found, strict=True):
            missing = {name for writer in one.writers for name in writer.norms} - checkpoint.tensors.keys()
            if missing:
                warnings.append(f"{checkpoint.path} has no {min(missing)}: that norm is taken for the identity")
        return cls(opened[0] if base is not None else None, opened[-1], found[0], found[-1], tuple(warnings))

    def __exit__(self, *_: object) -> None:
        for checkpoint in (self.base, self.post):
            if checkpoint is not None:
                checkpoint.close()

    def difference(self, number: int) -> Difference:
        """Read writer `number` of both checkpoints. Raises: `UserError` naming a tensor that holds NaN or infinity."""
        writer, base_writer = self.writers.writers[number], self.base_writers.writers[number]
        before = [_read(self.base, part) if self.base else None for part in base_writer.parts]
        after = [_read(self.post, part) for part in writer.parts]
        gains = norm_scale(self.base, base_writer), norm_scale(self.post, writer)
        difference = Difference(writer, tuple(zip(before, after, strict=True)), gains)
        if not bool(difference.sums.rows.isfinite().all()):
            for checkpoint, parts, weights in ((self.base, base_writer.parts, before), (self.post, writer.parts, after)):
                for part, one in zip(parts, weights, strict=True):
                    if checkpoint is not None and one is not None:
                        _finite(checkpoint, part.tensor, one)
        return difference

    def alarms(self, rows: Sequence[Tensor]) -> list[str]:
        """What is wrong if whole rows point elsewhere, given `Sums.rows` of every writer.

        A model computes the same if all that reads and writes the residual stream is permuted in step; its difference to the base is
        then as large as the weights. Rows with |w1 - w0|² > (|w0|² + |w1|²) / 2, that is a cosine under about a half, over all
        writers together, have moved; where most of them are found again at other rows, the hidden dimensions are permuted.
        """
        if self.base is None:
            return []
        base, post, difference = torch.stack([*rows]).sum(0)
        moved = difference > (base + post) / 2
        if moved.sum() < 2:
            return []
        number = next((i for i, writer in enumerate(self.writers.writers) if writer.kind == "attention"), 0)
        units = [
            torch.nn.functional.normalize(
                torch.cat([_read(checkpoint, part) for part in side.writers[number].parts], 1)[moved].float()
            )
            for checkpoint, side in ((self.base, self.base_writers), (self.post, self.writers))
        ]
        cosine, where = (units[0] @ units[1].mT).max(dim=1)
        found = (cosine > 0.9) & (where != torch.arange(len(where)))
        count = f"{int(moved.sum())} of {len(moved)} hidden dimensions"
        if found.float().mean() > 0.8:
            return [f"ALARM: {count} of {self.post.path} are permuted: undo that first, these directions mean nothing"]
        return [f"ALARM: {count} of {self.post.path} are unrelated to those of {self.base.path}: is it its fine-tune?"]


def read_config(checkpoint: Checkpoint, name: str = "config.json") -> dict[str, Any]:
    """A JSON object beside the weights; empty where there is none. Raises: `UserError` for anything else."""
    path = _folder(checkpoint) / name
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from None


def norm_scale(checkpoint: Checkpoint | None, writer: Writer) -> Tensor | None:
    """By how much the norms after a writer scale each of its rows, float32 [hidden size]; None without norms.

    Raises: `UserError` naming a norm that holds NaN or infinity.
    """
    scale = None
    for name in writer.norms:
        if checkpoint is not None and name in checkpoint.tensors:
            weight = _finite(checkpoint, name, checkpoint.tensor(name)).float() + writer.norm_offset
            scale = weight if scale is None else scale * weight
    return scale


def _open(source: Source) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    if (_folder(checkpoint) / "adapter_config.json").is_file() and any("lora_" in name for name in checkpoint.tensors):
        raise UserError(f"{checkpoint.path} is an adapter, not a model: read it with --adapter (Directions.of_adapter)")
    return checkpoint


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _writers_of(checkpoint: Checkpoint) -> ResidualWriters:
    config = read_config(checkpoint)
    quantised = config.get("quantization_config")
    how = f" ({quantised.get('quant_method', 'quantization_config')} in config.json)" if isinstance(quantised, dict) else ""
    try:
        found = residual_writers({name: info.shape for name, info in checkpoint.tensors.items()}, config)
    except UserError as error:
        hint = f"; its weights are quantised{how}: save it dequantised first" if how else ""
        raise UserError(f"{checkpoint.path}: {error}{hint}") from None
    for info in (checkpoint.tensors[part.tensor] for writer in found.writers for part in writer.parts):
        if info.dtype not in FLOATS:
            raise UserError(f"{info.file}: tensor {info.name} is {info.dtype}{how}: save the model dequantised first")
    return found


def _compare(opened: Sequence[Checkpoint], found: Sequence[ResidualWriters]) -> list[str]:
    """Raise what keeps two checkpoints from being subtracted; return what does not."""
    writers = [{(writer.layer, writer.kind): writer for writer in one.writers} for one in found]
    paths = [checkpoint.path for checkpoint in opened]
    for key in sorted(writers[0].keys() ^ writers[1].keys()):
        has = int(key in writers[1])
        name = writers[has][key].name
        raise UserError(f"{name} of {paths[has]} has no counterpart in {paths[1 - has]}: the architectures differ")
    for key, writer in writers[0].items():
        parts = [[(part.expert, part.shape) for part in one[key].parts] for one in writers]
        if parts[0] != parts[1]:
            shapes = " and ".join(f"{len(one)} x {[*one[0][1]]} in {path}" for one, path in zip(parts, paths, strict=True))
            raise UserError(f"{writer.name} is {shapes}: the architectures differ")
    warnings = []
    for name, info in opened[0].tensors.items():
        other = opened[1].tensors.get(name, info)
        if info.shape != other.shape:
            grown = "the vocabulary was resized" if info.shape[1:] == other.shape[1:] else "it is not compared"
            warnings.append(f"{name} is {[*info.shape]} in {paths[0]} and {[*other.shape]} in {paths[1]}: {grown}")
    if found[0].model_type != found[1].model_type:
        kinds = [one.model_type for one in found]
        warnings.append(f"{paths[0]} is a {kinds[0]} model, {paths[1]} a {kinds[1]} model of the same shapes")
    return warnings


def _read(checkpoint: Checkpoint, part: Part) -> Tensor:
    """The matrix of a part [hidden size, inputs] in its dtype and in the order of the file."""
    info = checkpoint.tensors[part.tensor]
    stored = part.shape[::-1] if part.transposed else part.shape
    size = math.prod(stored) * DTYPES[info.dtype]
    first = size * part.expert if part.fused and part.expert else 0
    matrix = torch.from_numpy(checkpoint.read(part.tensor, first, first + size)).view(FLOATS[info.dtype]).reshape(stored)
    return matrix.mT if part.transposed else matrix


def _finite(checkpoint: Checkpoint, name: str, weights: Tensor) -> Tensor:
    if not bool(weights.isfinite().all()):
        raise UserError(f"{checkpoint.tensors[name].file}: tensor {name} holds NaN or infinity")
    return weights
