"""Open a checkpoint and read ranges of its tensors. Source of the format: the safetensors specification."""

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcore.errors import UserError

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
_WIDE = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
DTYPES = {name: _WIDE.get(name, 1) for name in _TORCH}
"""Bytes per element of the dtypes that can be read, by their safetensors names."""
_LARGEST_HEADER = 100_000_000  # bytes, the specification's own bound


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `dtype` by its safetensors name, `start` in bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * DTYPES[self.dtype]


class Checkpoint:
    """An open checkpoint: names, shapes and dtypes from the headers alone, and any range of any tensor as raw bytes.

    A tensor's identity is its name in the files; tied weights exist once, under the saved name. Reads use `pread`, so threads may share
    a checkpoint. `tensors` is in file order; `metadata` has the `__metadata__` of each file, `index` the index file if there is one.

    >>> from lmcore.models import tiny_llama
    >>> folder = tempfile.mkdtemp()
    >>> tiny_llama(vocab_size=16).save_pretrained(folder)
    >>> with Checkpoint.open(folder) as checkpoint:
    ...     checkpoint.tensors["model.norm.weight"].shape, checkpoint.read("model.norm.weight", 0, 8)
    ((64,), array([  0,   0, 128,  63,   0,   0, 128,  63], dtype=uint8))
    """

    def __init__(self, path: Path, files: list[Path], index: dict[str, Any] | None = None):
        self.path, self.index = path, index
        self.metadata: dict[str, dict[str, str] | None] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self.metadata[file.name], tensors = read_header(file)
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise UserError(f"{file}: tensor {tensor.name} is in {self.tensors[tensor.name].file.name} too")
                self.tensors[tensor.name] = tensor
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "Checkpoint":
        """Open a folder, a .safetensors file, an index file, or a Hub id (the local cache first, then a download).

        Raises: `UserError` that names the file, and the tensor where there is one, if anything in the headers is wrong.
        """
        path = Path(source)
        if not path.exists():
            path = _from_hub(str(source))
        if path.is_file():
            return cls._from_index(path) if path.name.endswith(".index.json") else cls(path, [path])
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (path / name).is_file():
                return cls(path, [path / name])
        if (path / "model.safetensors.index.json").is_file():
            return cls._from_index(path / "model.safetensors.index.json")
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return cls(path, found)
        if found:
            raise UserError(f"{path} has {len(found)} safetensors files but no model.safetensors.index.json")
        if any(path.glob("*.bin")):
            raise UserError(f"{path} has only pickled weights (.bin): load and save_pretrained it with transformers first")
        raise UserError(f"{path} has no model.safetensors and no model.safetensors.index.json")

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes [start, stop) of a tensor as uint8, read into the beginning of `out` (uint8) where that is given."""
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        if not 0 <= start <= stop <= tensor.nbytes:
            raise ValueError(f"range [{start}, {stop}) of {name}, which has {tensor.nbytes} bytes")
        with self._opening:
            if tensor.file not in self._descriptors:
                self._descriptors[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        buffer = np.empty(stop - start, np.uint8) if out is None else out[: stop - start]
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptors[tensor.file], [buffer[done:].data], tensor.start + start + done)
            if count == 0:
                raise UserError(f"{tensor.file}: tensor {name} ends early: the file became shorter while it was read")
            done += count
        return buffer

    def tensor(self, name: str) -> "torch.Tensor":
        """The whole tensor, as a torch tensor of its dtype and shape on the CPU."""
        import torch

        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, _TORCH[info.dtype]))
        self.read(name, out=tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def _from_index(cls, path: Path) -> "Checkpoint":
        try:
            index = json.loads(path.read_text())
            weight_map = dict(index["weight_map"])
            files = [path.parent / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of a sharded checkpoint ({type(error).__name__}: {error})") from None
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: this shard is missing (named in {path.name})")
        opened = cls(path.parent, files, index)
        for name in sorted(weight_map.keys() | opened.tensors.keys()):
            if name not in weight_map:
                raise UserError(f"{opened.tensors[name].file}: tensor {name} is not in the index")
            found = opened.tensors[name].file.name if name in opened.tensors else "no shard"
            if found != weight_map[name]:
                raise UserError(
                    f"{path.parent / weight_map[name]}: tensor {name} is missing (found in {found}), though the index names it"
                )
        return opened


def read_header(file: Path) -> tuple[dict[str, str] | None, list[TensorInfo]]:
    """The metadata and tensors of one safetensors file, in the order of their bytes, checked down to the last byte."""
    total = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if total < 8 or not 2 <= length <= min(_LARGEST_HEADER, total - 8):
            raise UserError(f"{file}: header length {length} in {total} bytes: truncated, unfinished or not a safetensors file")
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1].get("data_offsets", []))
    except _DuplicateNameError as error:
        raise UserError(f"{file}: tensor {error} is in the header twice") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: the header is not that of a safetensors file ({type(error).__name__}: {error})") from None
    tensors, end, data = [], 0, total - 8 - length
    for name, entry in entries:
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: tensor {name} needs dtype, shape and two data_offsets, has {entry}") from None
        _check(f"{file}: tensor {name}", dtype, shape, start, stop, end, data)
        tensors.append(TensorInfo(name, dtype, shape, file, 8 + length + start))
        end = stop
    if end != data:
        raise UserError(
            f"{file}: tensor {tensors[-1].name if tensors else '(none)'} ends at byte {end} of the data, which has {data}"
        )
    return metadata, tensors


def _check(who: str, dtype: Any, shape: tuple[Any, ...], start: Any, stop: Any, end: int, data: int) -> None:
    """A tensor fills bytes [start, stop), right after the one that ended at `end`, in a file with `data` bytes of data."""
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise UserError(f"{who} has shape {shape} and offsets {start}, {stop}: whole numbers >= 0 are needed")
    if dtype not in DTYPES:
        raise UserError(f"{who} has dtype {dtype}, known are {', '.join(DTYPES)}")
    if stop - start != math.prod(shape) * DTYPES[dtype]:
        raise UserError(f"{who} has offsets {start} to {stop}, but its shape takes {math.prod(shape) * DTYPES[dtype]} bytes")
    if start != end:
        fault = "overlaps the tensor before it" if start < end else "leaves unnamed bytes before it"
        raise UserError(f"{who} starts at byte {start} and {fault}, which ends at {end}")
    if stop > data:
        raise UserError(f"{who} needs data up to byte {stop}, the file has {data}: it is truncated")


class _DuplicateNameError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateNameError(next(name for name in names if names.count(name) > 1))
    return named


def _from_hub(source: str) -> Path:
    """Resolve a Hub id: what is in the local cache without a connection, else a download, since the user asked for it by name."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{source} is not a folder; to read it from the Hub: pip install huggingface_hub") from None
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    for offline in (True, False):
        try:
            return Path(snapshot_download(source, allow_patterns=wanted, local_files_only=offline))
        except Exception as error:  # the Hub's client raises its own errors, the network's and the operating system's
            reason = type(error).__name__
    raise UserError(f"{source} is neither a folder here nor could it be had from the Hub ({reason})")
