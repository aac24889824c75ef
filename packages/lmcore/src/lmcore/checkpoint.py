"""Safetensors checkpoints as ranges of bytes: read any, write in any order, never hold more than a range, import torch only if asked."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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
DTYPES = {name: int(name.strip("BCFILOU").partition("_")[0] or 8) // 8 for name in _TORCH}
"""Bytes per element of the dtypes that can be read, by their safetensors names."""
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


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


def _close(opened: "Checkpoint | CheckpointWriter", *_: object) -> None:
    """Close the files; unsealed ones stay unreadable."""
    while opened._descriptors:
        os.close(opened._descriptors.popitem()[1])


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """An open checkpoint: names, shapes and dtypes from the headers alone, and any range of any tensor as raw bytes.

    A tensor's identity is its name in the files; tied weights exist once, under the saved name. Reads use `pread`, so threads may share
    a checkpoint. `tensors` is in file order; `metadata` has the `__metadata__` of each file, `index` the index file if there is one;
    `folder` is that of config and tokenizer, None for a loose file that is not named as part of a model.

    >>> from lmcore.models import tiny_llama
    >>> tiny_llama(vocab_size=16).save_pretrained(folder := tempfile.mkdtemp())
    >>> with Checkpoint.open(folder) as checkpoint:
    ...     checkpoint.tensors["model.norm.weight"].shape, checkpoint.read("model.norm.weight", 0, 8)
    ((64,), array([  0,   0, 128,  63,   0,   0, 128,  63], dtype=uint8))
    """

    def __init__(self, path: Path, files: list[Path], index: dict[str, Any] | None = None):
        self.path, self.index = path, index
        self.folder = path if path.is_dir() else path.parent if path.name.startswith(("model.", "adapter_model.")) else None
        self.metadata: dict[str, dict[str, str] | None] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        for file in files:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
            self.metadata[file.name], tensors = read_header(file)
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise UserError(f"{file}: tensor {tensor.name} is in {self.tensors[tensor.name].file.name} too")
                self.tensors[tensor.name] = tensor

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "Checkpoint":
        """Open a folder, a .safetensors or index file, or a Hub id (local cache first); `UserError` names the file and tensor at fault."""
        path = Path(source) if Path(source).exists() else _from_hub(str(source))
        file = _file_in(path) if path.is_dir() else path
        return cls._from_index(file) if file.name.endswith(".index.json") else cls(path, [file])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes [start, stop) of a tensor, uint8."""
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        if not 0 <= start <= stop <= tensor.nbytes:
            raise ValueError(f"range [{start}, {stop}) of {name}, which has {tensor.nbytes} bytes")
        data, done = np.empty(stop - start, np.uint8), 0
        while done < len(data):
            count = os.preadv(self._descriptors[tensor.file], [data[done:].data], tensor.start + start + done)
            if count == 0:
                raise UserError(f"{tensor.file}: tensor {name} ends early: the file became shorter while it was read")
            done += count
        return data

    def tensor(self, name: str) -> "torch.Tensor":
        """The whole tensor, as a torch tensor of its dtype and shape on the CPU."""
        import torch

        info = self.tensors[name]
        numbers = torch.from_numpy(self.read(name).view(f"u{DTYPES[info.dtype]}"))
        return numbers.view(getattr(torch, _TORCH[info.dtype])).reshape(info.shape)

    close = __del__ = __exit__ = _close

    @classmethod
    def _from_index(cls, path: Path) -> "Checkpoint":
        try:
            index = json.loads(path.read_bytes())
            weight_map = dict(index["weight_map"])
            files = [path.parent / name for name in sorted(set(weight_map.values()))]
        except _MALFORMED as error:
            raise UserError(f"{path} is not an index of a sharded checkpoint ({type(error).__name__}: {error})") from None
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: this shard is missing (named in {path.name})")
        opened = cls(path.parent, files, index)
        found = {name: tensor.file.name for name, tensor in opened.tensors.items()}
        for name, shard in sorted(found.items() ^ weight_map.items()):
            where = f"is in {found.get(name, 'no shard')}, though {path.name} names {weight_map.get(name, 'none')}"
            raise UserError(f"{path.parent / shard}: tensor {name} {where}")
        return opened


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Preallocates the shards of a checkpoint in `folder` and fills them; leaving the `with` block seals it.

    `shards` maps file names to the tensors in them (name, dtype and shape count; `file` and `start` are assigned here); several shards get
    an index file. Threads may write at once. The headers are written last: until then every shard starts with eight zero bytes, which no
    reader takes for a safetensors file, so a killed run cannot be loaded as complete. Let `lmcore.record.published` give the folder.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[TensorInfo]], *, index_metadata: Mapping[str, Any] | None = None,
                 metadata: Mapping[str, dict[str, str] | None] | None = None):  # fmt: skip
        self.tensors: dict[str, TensorInfo] = {}
        self._folder, self._index_metadata = folder, index_metadata
        self._headers: dict[Path, bytes] = {}
        self._descriptors: dict[Path, int] = {}
        for name, tensors in shards.items():
            self._allocate(folder / name, tensors, (metadata or {}).get(name, {"format": "pt"}))

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write the bytes of `data` (any dtype, C order) at byte `start` of a tensor."""
        tensor, view = self.tensors[name], np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if start < 0 or start + len(view) > tensor.nbytes:
            raise ValueError(f"bytes [{start}, {start + len(view)}) of {name}, which has {tensor.nbytes} bytes")
        position = tensor.start + start
        while view:
            written = os.pwrite(self._descriptors[tensor.file], view, position)
            view, position = view[written:], position + written

    def seal(self) -> None:
        """Write the index and the headers: from here on the checkpoint is complete."""
        if len(self._headers) > 1 or self._index_metadata is not None:
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            weight_map = {name: tensor.file.name for name, tensor in self.tensors.items()}
            index = {"metadata": {**(self._index_metadata or {}), "total_size": total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path, header in self._headers.items():
            os.pwrite(self._descriptors[path], header[8:], 8)
            os.pwrite(self._descriptors[path], header[:8], 0)

    close = __del__ = _close

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.seal()
        self.close()

    def _allocate(self, path: Path, tensors: Sequence[TensorInfo], metadata: dict[str, str] | None) -> None:
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        stop = 0
        for tensor in tensors:
            if tensor.name in self.tensors or tensor.name in entries:
                raise ValueError(f"tensor {tensor.name} is to be written twice")
            start, stop = stop, stop + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._headers[path] = len(text).to_bytes(8, "little") + text
        for tensor in tensors:
            self.tensors[tensor.name] = replace(tensor, file=path, start=base + entries[tensor.name]["data_offsets"][0])
        self._descriptors[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._descriptors[path], 0, base + stop)
        except OSError as error:  # which names neither the file nor its size
            raise OSError(error.errno, f"{error.strerror}: it takes {base + stop:,} bytes", str(path)) from None


def shards_like(checkpoint: Checkpoint, dtype: str | None = None) -> dict[str, list[TensorInfo]]:
    """The shards of a checkpoint, to write another like it; `dtype` replaces that of every floating-point tensor."""
    shards: dict[str, list[TensorInfo]] = {name: [] for name in checkpoint.metadata}
    for tensor in checkpoint.tensors.values():
        kind = dtype if dtype and tensor.dtype in ("F64", "F32", "F16", "BF16") else tensor.dtype
        shards[tensor.file.name].append(replace(tensor, dtype=kind))
    return shards


def copy_model_files(checkpoint: Checkpoint, folder: Path, dtype: str | None = None, leave: Collection[str] = ()) -> None:
    """Copy config, tokenizer and generation files, but those in `leave`; `dtype` (e.g. bfloat16) takes the place of that in config.json."""
    leave = {"trainer_state.json", "adapter_config.json", *leave}
    for path in checkpoint.folder.iterdir() if checkpoint.folder else ():
        carried = path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
        if carried and path.name not in leave and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if dtype and config.is_file():
        try:
            fields = json.loads(config.read_bytes()) | {"dtype": dtype}
        except _MALFORMED as error:
            raise UserError(f"{checkpoint.path}: config.json cannot be read ({type(error).__name__}: {error})") from None
        fields.pop("torch_dtype", None)
        config.write_text(json.dumps(fields, indent=2) + "\n")


def _file_in(folder: Path) -> Path:
    """The file to open for a folder: its weights, or the index of its shards."""
    named = [folder / name for name in ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")]
    found = [path for path in named if path.is_file()][:1] or [*folder.glob("*.safetensors")]
    if not found and any(folder.glob("*.bin")):
        raise UserError(f"{folder} has only pickled weights (.bin): save them anew with transformers")
    if len(found) != 1:
        raise UserError(f"{folder} has no model.safetensors and no index of shards, but {len(found)} safetensors files")
    return found[0]


def read_header(file: Path) -> tuple[dict[str, str] | None, list[TensorInfo]]:
    """The metadata and tensors of one safetensors file, in the order of their bytes, checked down to the last byte."""
    total = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(100_000_000, total - 8):  # the first is the specification's own bound
            raise UserError(f"{file}: header length {length} in {total} bytes: truncated, unfinished or not a safetensors file")
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None)
        if not all(isinstance(text, str) for text in dict(metadata or {}).values()):
            raise ValueError("__metadata__ is not a table of texts")
        entries = sorted(header.items(), key=lambda item: item[1].get("data_offsets", []))
    except _MALFORMED as error:
        raise UserError(f"{file}: the header is not that of a safetensors file ({type(error).__name__}: {error})") from None
    tensors, end, data = [], 0, total - 8 - length
    for name, entry in entries:
        tensors.append(_tensor(file, name, entry, end, 8 + length))
        end += tensors[-1].nbytes
    if end != data:
        last = tensors[-1].name if tensors else "(none)"
        fault = "it is truncated" if end > data else "the rest has no name"
        raise UserError(f"{file}: tensor {last} ends at byte {end} of the data, which has {data}: {fault}")
    return metadata, tensors


def _tensor(file: Path, name: str, entry: Any, end: int, base: int) -> TensorInfo:
    """Check an entry of a header: byte `base` of the file is where the data begin, `end` where the tensor before it ended."""
    who = f"{file}: tensor {name}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPES or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(entry)
    except _MALFORMED:
        needed = f"a dtype of {', '.join(DTYPES)}, and a shape and two data_offsets in whole numbers >= 0"
        raise UserError(f"{who} is described as {entry}, which is not {needed}") from None
    tensor = TensorInfo(name, dtype, shape, file, base + start)
    if stop - start != tensor.nbytes:
        raise UserError(f"{who} has offsets {start} to {stop}, but its shape takes {tensor.nbytes} bytes")
    if start != end:
        fault = "overlaps the tensor before it" if start < end else "leaves unnamed bytes before it"
        raise UserError(f"{who} starts at byte {start} and {fault}, which ends at {end}")
    return tensor


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    (name, count), *_ = [*Counter(name for name, _ in pairs).most_common(1), ("", 0)]
    if count > 1:
        raise ValueError(f"{name} is there twice")
    return dict(pairs)


def _from_hub(source: str) -> Path:
    """Resolve a Hub id: what is in the local cache without a connection, else a download, since the user asked for it by name."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    for offline in (True, False):
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(source, allow_patterns=wanted, local_files_only=offline))
            if not offline or any(folder.glob("*.safetensors")):  # the cache may hold no more than a tokenizer
                return folder
        except Exception as error:  # the Hub's client raises its own errors, the network's and the operating system's
            reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{source} is neither a folder here nor could it be had from the Hub ({reason})")
