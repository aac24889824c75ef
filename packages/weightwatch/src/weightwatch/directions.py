"""Directions: the singular vectors of a weight difference on the side of the residual stream."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from lmcore.record import published, write_json
from weightwatch.lora import Adapter
from weightwatch.noise import bound_of_variances, edge_of_rest, edge_of_sums, edge_of_variances
from weightwatch.pair import Pair, Source, norm_scale, read_config
from weightwatch.residual_writers import Kind, ResidualWriters, Writer
from weightwatch.singular import BlockKrylov, SingularVectors

RESOLUTION = 2.0**-20
"""Singular values below this share of the first are lost in the float32 arithmetic of a difference and its products."""
T = TypeVar("T")


@dataclass(frozen=True)
class WriterDirections:
    """The leading singular vectors of the difference Δ = Σ σ_i u_i v_iᵀ of one residual writer."""

    layer: int
    kind: Kind
    name: str
    """Name of the tensor (`Writer.name`)."""
    shape: tuple[int, int]
    """[hidden size, inputs]."""
    vectors: Tensor
    """u_i: float32 [k, hidden size], unit rows."""
    sigma: tuple[float, ...]
    """The k largest singular values, descending."""
    residuals: tuple[float, ...]
    """The certificate of each (`SingularVectors`)."""
    method: str
    """How they were computed: krylov, gram or exact."""
    edge: float
    """Singular values up to here may be rounding noise (`edge_of_variances`; where all k lie above the coarser `bound_of_variances`, that),
    or anything without order if `bulk` is smaller; never under 2^-20 of the first, which float32 arithmetic blurs."""
    bulk: float
    """Singular values up to here may be a change without order, such as added noise, of the size that Δ has (`edge_of_rest`)."""
    norm: float
    """|Δ| (Frobenius)."""
    base_norm: float | None
    """|W_base|, None where it was not read."""
    changed: float | None
    """Share of the entries that differ, None for an adapter."""

    @property
    def label(self) -> str:
        """`D4` for the MLP of block 4, `O4` for its attention."""
        return f"{'D' if self.kind == 'mlp' else 'O'}{self.layer}"

    @property
    def signal(self) -> int:
        """How many of the k directions lie above the noise edge."""
        return sum(value > self.edge for value in self.sigma)

    @property
    def structured(self) -> int:
        """How many of the k directions lie above the bulk, too: those of a change that has an order."""
        return sum(value > max(self.edge, self.bulk) for value in self.sigma)

    @property
    def stable_rank(self) -> float:
        """|Δ|² / σ_1²: about how many directions share the difference; 0 without one."""
        return (self.norm / self.sigma[0]) ** 2 if self.sigma and self.sigma[0] else 0.0


@dataclass(frozen=True)
class Bank:
    """Directions to watch, stacked block by block for kernels."""

    layers: tuple[int, ...]
    """Numbers of the blocks, ascending."""
    blocks: tuple[str, ...]
    """Names of their modules: the directions belong to what these return."""
    vectors: Tensor
    """float32 [blocks, t, hidden size]: unit rows, then rows of zeros where a block has fewer than t."""
    labels: tuple[tuple[str, ...], ...]
    """Per block, the label of each row that is not padding."""
    sigma: tuple[tuple[float, ...], ...]
    """Likewise, its singular value."""
    directions: str
    """`Directions.digest` of those they are from."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Directions per block."""
        return tuple(map(len, self.labels))


@dataclass(frozen=True)
class Directions:
    """The leading singular vectors of every residual writer of a model.

    >>> from lmcore.models import tiny_llama
    >>> tiny_llama(vocab_size=16, hidden_size=32).save_pretrained(base := tempfile.mkdtemp())
    >>> model = tiny_llama(vocab_size=16, hidden_size=32)
    >>> u, v = torch.eye(32)[3], torch.ones(32)
    >>> model.model.layers[1].self_attn.o_proj.weight.data += torch.outer(u, v)
    >>> model.save_pretrained(post := tempfile.mkdtemp())
    >>> directions = Directions.of(base, post, k=4)
    >>> [(one.label, one.signal) for one in directions.writers], directions.layer(1)[4, :5]
    ([('D0', 0), ('O0', 0), ('D1', 0), ('O1', 1)], tensor([0., 0., 0., 1., 0.]))
    """

    source: dict[str, str]
    """`method` ("difference", "raw" or "adapter") and the names of what was read."""
    model_type: str
    hidden_size: int
    blocks: dict[int, str]
    """Names of the blocks' modules by layer (`ResidualWriters`)."""
    detected: bool
    """The architecture is unknown: its residual writers were told by shapes and names."""
    k: int
    writers: tuple[WriterDirections, ...]
    warnings: tuple[str, ...] = ()
    """What to know before trusting them."""

    @classmethod
    def of(cls, base: Source, post: Source, k: int = 20, *, seed: int = 0, progress: bool = False) -> "Directions":
        """The directions of W_post - W_base, for two checkpoints on disk (`Checkpoint.open`); no model is built.

        Each thread holds one writer at a time, its two weights and a float32 matrix beside them, and computes alone, so that the bits do
        not depend on how many threads there are (`torch.get_num_threads`). The experts of a block are one writer. What is doubtful, such as
        permuted hidden dimensions, is given as a warning and kept in `warnings`.

        Raises: `UserError` as `Pair.open` does, and for NaN or infinity in a weight.
        Source: Zhong and Raghunathan 2025 (arXiv 2508.00161), section 3; k = 20 is theirs.
        """
        with Pair.open(base, post) as pair:
            found = _in_threads(lambda number: _of_pair(pair, number, k, seed), len(pair.writers.writers), progress)
            alarms = pair.alarms([rows for _, rows in found])
        source = {"method": "difference", "base": _name(base), "post": _name(post)}
        return cls._of(pair.writers, source, k, [one for one, _ in found], (*pair.warnings, *alarms))

    @classmethod
    def raw(cls, post: Source, k: int = 20, *, seed: int = 0, progress: bool = False) -> "Directions":
        """The directions of W_post itself, for a model without a base; those beyond `bulk` count as signal.

        The paper finds them as good on some backdoored models and useless on others (its appendix F.3). Raises: as `of`.
        """
        with Pair.open(None, post) as pair:
            found = _in_threads(lambda number: _of_pair(pair, number, k, seed), len(pair.writers.writers), progress)
        return cls._of(pair.writers, {"method": "raw", "post": _name(post)}, k, [one for one, _ in found], pair.warnings)

    @classmethod
    def of_adapter(cls, adapter: Source, k: int = 20, *, base: Source | None = None) -> "Directions":
        """The directions of a LoRA adapter of peft, exact: no weight of the base is read, but its config.json and norms, if it is given.

        There is no noise, so every nonzero singular value counts as signal.
        Raises: `UserError` for adapters other than LoRA and rsLoRA, NaN or infinity, or an adapter that changes no residual writer.
        """
        with Checkpoint.open(adapter) as checkpoint, nullcontext() if base is None else Checkpoint.open(base) as model:
            lora = Adapter.of(checkpoint, read_config(model) if model else None)
            found = [_of_adapter(lora, writer, k, model) for writer in lora.writers.writers]
        source = {"method": "adapter", "post": _name(adapter), **({} if base is None else {"base": _name(base)})}
        return cls._of(lora.writers, source, k, found, lora.warnings)

    @classmethod
    def load(cls, folder: Path | str) -> "Directions":
        """Read what `save` wrote. Raises: `UserError` where it is missing, damaged or edited."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "directions.json").read_bytes())
            vectors = load_file(folder / "directions.safetensors")
            digest, rows = content.pop("digest"), content.pop("writers")
            writers = tuple(WriterDirections(vectors=vectors[row.pop("label")], **_tuples(row)) for row in rows)
            content["blocks"] = {int(layer): name for layer, name in content["blocks"].items()}
            loaded = cls(writers=writers, **_tuples(content))
        except Exception as error:  # whatever a missing or damaged file brings
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder} holds no directions ({reason}): make them with weightwatch directions") from None
        if loaded.digest != digest:
            raise UserError(f"{folder}: directions.json and directions.safetensors do not belong together, or one was edited")
        return loaded

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write directions.safetensors (vectors by label) and directions.json (the rest), whole or not at all (`published`)."""
        with published(Path(folder), overwrite=overwrite) as place:
            save_file({one.label: one.vectors for one in self.writers}, place / "directions.safetensors")
            write_json(place / "directions.json", {**self._facts(), "digest": self.digest})

    @cached_property
    def digest(self) -> str:
        """BLAKE2b of every number and name, 32 hexadecimal digits: what belongs to these directions refers to them by it."""
        digest = hashlib.blake2b(json.dumps(self._facts(), sort_keys=True).encode(), digest_size=16)
        for one in self.writers:
            digest.update(one.vectors.numpy().tobytes())
        return digest.hexdigest()

    @property
    def labels(self) -> list[str]:
        """`D{layer}_u{i}` and `O{layer}_u{i}`, block by block, named and ordered as in the paper's code."""
        return [f"{one.label}_u{i}" for one in self.writers for i in range(len(one.sigma))]

    @property
    def signal(self) -> int:
        """How many directions lie above the noise edge: with none, there is no difference above rounding."""
        return sum(one.signal for one in self.writers)

    def layer(self, layer: int) -> Tensor:
        """All directions of one block, float32 [n, hidden size]: those of the MLP, then those of the attention."""
        return torch.cat([torch.zeros(0, self.hidden_size), *(one.vectors for one in self.writers if one.layer == layer)])

    def stack(self, k: int | None = None, *, signal_only: bool = True, drop_last: int = 3) -> Bank:
        """The directions to watch: at most `k` of each writer, and with `signal_only` none that may be noise.

        The last `drop_last` blocks are left out; the paper drops three, "for numerical stability".
        Raises: `UserError` if none is left.
        """
        kept = sorted(self.blocks)[: max(0, len(self.blocks) - drop_last)]
        watched: dict[int, list[tuple[WriterDirections, int]]] = {}
        for one in self.writers:
            count = min(one.signal if signal_only else len(one.sigma), len(one.sigma) if k is None else k)
            if one.layer in kept and count:
                watched.setdefault(one.layer, []).extend((one, i) for i in range(count))
        if not watched:
            raise UserError(
                f"the first {len(kept)} of {len(self.blocks)} blocks have no direction above the noise edge: nothing to watch, unless "
                f"the last {drop_last} have one (drop_last=0, --drop-last 0)"
            )
        vectors = torch.zeros(len(watched), max(map(len, watched.values())), self.hidden_size)
        for place, rows in zip(vectors, watched.values(), strict=True):
            place[: len(rows)] = torch.stack([one.vectors[i] for one, i in rows])
        labels = tuple(tuple(f"{one.label}_u{i}" for one, i in rows) for rows in watched.values())
        sigma = tuple(tuple(one.sigma[i] for one, i in rows) for rows in watched.values())
        return Bank(tuple(watched), tuple(self.blocks[layer] for layer in watched), vectors, labels, sigma, self.digest)

    @classmethod
    def _of(
        cls, known: ResidualWriters, source: dict[str, str], k: int, found: list[WriterDirections], texts: tuple[str, ...]
    ) -> "Directions":
        for text in texts:
            warnings.warn(text, stacklevel=3)
        return cls(source, known.model_type, known.hidden_size, known.blocks, known.detected, k, tuple(found), texts)

    def _facts(self) -> dict[str, Any]:
        """Everything but the vectors, for JSON."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = [{"label": one.label, **vars(one)} for one in self.writers]
        for row in rows:
            del row["vectors"]
        return {**facts, "blocks": {str(layer): name for layer, name in self.blocks.items()}, "writers": rows}


def _of_pair(pair: Pair, number: int, k: int, seed: int) -> tuple[WriterDirections, Tensor]:
    """The directions of one writer, and its `Sums.rows`."""
    difference = pair.difference(number)
    sums, iteration = difference.sums, BlockKrylov(difference, k, seed=seed, name=difference.writer.name)
    bulk = edge_of_sums(sums.rows[2], sums.columns)
    edge = min(bulk, bound_of_variances(*sums.variances)) if pair.base else bulk
    found = iteration.until(edge)
    if pair.base and not bool((found.values > edge).all()):
        edge = edge_of_variances(difference.rounding_variances(), at_most=bulk)
        found = iteration.until(edge)
    bulk = edge_of_rest(sums.rows[2], sums.columns, found)
    edge = max(min(edge, bulk), RESOLUTION * float(found.values[0]))
    found = iteration.until(edge)  # what lay below the first edge is taken for noise until here
    base_norm, _, norm = sums.rows.sum(1).sqrt().tolist()
    return _made(difference.writer, found, edge, bulk, norm, base_norm if pair.base else None, sums.changed), sums.rows


def _of_adapter(lora: Adapter, writer: Writer, k: int, base: Checkpoint | None) -> WriterDirections:
    found = lora.singular_vectors(writer, norm_scale(base, writer))
    rows, columns = ((side.double() * found.values[:, None]).square().sum(0) for side in (found.left, found.right))
    norm = float(found.values.norm())
    edge = float(found.values[0]) * 2.0**-50 * max(writer.shape)  # what float64 makes of a zero
    return _made(writer, found.first(k), edge, edge_of_rest(rows, columns, found.first(k)), norm, None, None)


def _made(writer: Writer, found: SingularVectors, *rest: Any) -> WriterDirections:
    sigma, residuals = (tuple(numbers.tolist()) for numbers in (found.values, found.residuals))
    where = writer.layer, writer.kind, writer.name, writer.shape
    return WriterDirections(*where, found.left, sigma, residuals, found.method, *rest)


def _in_threads(work: Callable[[int], T], count: int, progress: bool) -> list[T]:
    """`work` of 0 to count - 1, each on one thread of its own: what torch shares out among threads adds up in another order."""
    threads = torch.get_num_threads()
    # The C library takes the largest block ever freed (up to 32 MB) for the size from which on it returns memory: without this, that of
    # each matrix would be mapped and cleared anew, for which threads wait for each other.
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(tqdm(pool.map(work, range(count)), total=count, unit="matrix", disable=not progress))
    finally:
        torch.set_num_threads(threads)  # the number that new threads start with


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _name(source: Source) -> str:
    return Path(os.fspath(source)).resolve().name if Path(source).exists() else str(source)
