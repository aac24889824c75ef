"""Run a plan: read every byte once, a block at a time, on several threads, and write the outputs as they come."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash
from tqdm import tqdm

from lmcore.checkpoint import DTYPES, Checkpoint, TensorInfo
from lmcore.errors import UserError
from wiseft.ops.lerp.numpy import BITS, BLOCK
from wiseft.plan import Step

Combine = Callable[[ModuleType, Step, int, list[np.ndarray], np.ndarray], None]
"""`combine(arithmetic, step, number, sources, out)`: the float64 weights of output `number` from those of every source."""
_MANY = 2**28  # weights from which on numba's speed (four times NumPy's) is worth the second that importing it takes


@runtime_checkable
class Sink(Protocol):
    """Where an output goes: a `CheckpointWriter`, or something that compares (see `wiseft.verification`)."""

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Take the bytes of a tensor from byte `start` on."""


def interpolate(arithmetic: ModuleType, step: Step, number: int, sources: list[np.ndarray], out: np.ndarray) -> None:
    """The merge of two: `late + delta * (early - late)`."""
    early, late = sources
    arithmetic.mix(early, late, step.deltas[number], out)


def average(arithmetic: ModuleType, step: Step, number: int, sources: list[np.ndarray], out: np.ndarray) -> None:
    """The soup of many: `sum(weight * x) / sum(weight)`."""
    out[:] = 0
    for source, weight in zip(sources, step.deltas, strict=True):
        arithmetic.add_scaled(out, source, weight)
    out /= sum(step.deltas)


def run(steps: Sequence[Step], sources: Sequence[Checkpoint], sinks: Sequence[Sink], combine: Combine) -> dict[str, list[str]]:
    """Send every tensor of `steps` through `combine` into each sink; returns the digest of each source and of each output.

    Memory: a few blocks of 32,768 weights per thread, whatever the size of the model. A digest is the SHA-256 of one line
    `name dtype shape xxh3-128` per tensor, sorted by name, over the bytes that were read or written: the same for any sharding.

    Raises: `UserError` that names a tensor holding NaN or infinity and where it is, or whose result the dtype cannot hold.
    """
    lines: list[list[str]] = [[] for _ in (*sources, *sinks)]
    many = sum(step.mixed for step in steps) >= _MANY
    arithmetic = import_module(f"wiseft.ops.lerp.{'numba' if many else 'numpy'}")

    def one(step: Step) -> None:
        tensor = _Tensor(step, sources, sinks, combine, arithmetic)
        tensor.run()
        for seen, line in zip(lines, tensor.digest_lines(), strict=True):
            seen += line

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool, _progress(steps) as bar:
        largest_first = sorted(steps, key=lambda step: -step.target.nbytes)
        running = [(step, pool.submit(one, step)) for step in largest_first]
        try:
            for step, future in running:
                future.result()
                bar.update(step.target.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    totals = [total_digest(seen) for seen in lines]
    return {"sources": totals[: len(sources)], "outputs": totals[len(sources) :]}


class _Tensor:
    """One tensor on its way through: its buffers and the digests of what was read and written."""

    def __init__(
        self, step: Step, sources: Sequence[Checkpoint], sinks: Sequence[Sink], combine: Combine, arithmetic: ModuleType
    ):
        self.step, self.sources, self.sinks, self.combine, self.arithmetic = step, sources, sinks, combine, arithmetic
        self._read = [xxhash.xxh3_128() for _ in sources]
        self._written = [xxhash.xxh3_128() for _ in sinks]

    def run(self) -> None:
        step, target = self.step, self.step.target
        data = np.empty(BLOCK, BITS.get(target.dtype, np.uint8))
        wide = [np.empty(BLOCK) for _ in self.sources]
        mixed = np.empty(BLOCK)
        for start, stop in _blocks(0, step.mixed):
            count = stop - start
            weights = [buffer[:count] for buffer in wide]
            for source, buffer in enumerate(weights):
                self._decode(source, start, stop, buffer)
            for number in range(len(self.sinks)):
                self.combine(self.arithmetic, step, number, weights, mixed[:count])
                if self.arithmetic.encode(mixed[:count], target.dtype, data[:count]):
                    raise self._not_finite(weights, start)
                self._write(number, start, data[:count])
        unchanged = step.mixed < target.size and self.sources[step.rest].tensors[target.name].dtype == target.dtype
        for start, stop in _blocks(step.mixed, target.size):
            if unchanged:
                rest = self._raw(step.rest, start, stop)
            else:
                self._decode(step.rest, start, stop, mixed[: stop - start])
                rest = data[: stop - start]
                if self.arithmetic.encode(mixed[: stop - start], target.dtype, rest):
                    raise self._not_finite([mixed[: stop - start]], start)
            for number in range(len(self.sinks)):
                self._write(number, start, rest)

    def digest_lines(self) -> Iterator[list[str]]:
        """For each source and sink, the line of this tensor; none where the source took no part."""
        target = self.step.target
        for number, (source, digest) in enumerate(zip(self.sources, self._read, strict=True)):
            took_part = self.step.mixed or number == self.step.rest
            yield [digest_line(source.tensors[target.name], digest)] if took_part else []
        for digest in self._written:
            yield [digest_line(target, digest)]

    def _raw(self, source: int, start: int, stop: int) -> np.ndarray:
        checkpoint, name = self.sources[source], self.step.target.name
        itemsize = DTYPES[checkpoint.tensors[name].dtype]
        data = checkpoint.read(name, start * itemsize, stop * itemsize)
        self._read[source].update(data.data)
        return data

    def _decode(self, source: int, start: int, stop: int, out: np.ndarray) -> None:
        dtype = self.sources[source].tensors[self.step.target.name].dtype
        self.arithmetic.decode(self._raw(source, start, stop).view(BITS[dtype]), dtype, out)

    def _write(self, number: int, start: int, data: np.ndarray) -> None:
        self.sinks[number].write(self.step.target.name, start * DTYPES[self.step.target.dtype], data)
        self._written[number].update(data.data)

    def _not_finite(self, weights: list[np.ndarray], start: int) -> UserError:
        name = self.step.target.name
        sources = self.sources if len(weights) > 1 else [self.sources[self.step.rest]]
        for checkpoint, values in zip(sources, weights, strict=True):
            if not np.isfinite(values).all():
                at = int(np.flatnonzero(~np.isfinite(values))[0])
                return UserError(f"{checkpoint.tensors[name].file}: tensor {name} holds {values[at]} at element {start + at}")
        return UserError(
            f"tensor {name} has values near element {start} that {self.step.target.dtype} cannot hold: use a wider dtype"
        )


def total_digest(lines: Sequence[str]) -> str:
    """The digest of a checkpoint from those of its tensors: SHA-256 of the sorted lines, the same for any sharding."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def digest_line(info: TensorInfo, digest: "xxhash.xxh3_128") -> str:
    """The line `name dtype shape xxh3-128` of one tensor."""
    return f"{info.name} {info.dtype} {list(info.shape)} {digest.hexdigest()}"


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, BLOCK):
        yield begin, min(begin + BLOCK, stop)


def _progress(steps: Sequence[Step]) -> Any:
    total = sum(step.target.nbytes for step in steps)
    return tqdm(total=total, unit="B", unit_scale=True, desc="merging", file=sys.stderr, disable=None, leave=False)
