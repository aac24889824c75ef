"""Write a checkpoint range by range, in any order."""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lmcore.checkpoint.reader import Checkpoint, TensorInfo
from lmcore.errors import UserError


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Preallocates the shards of a checkpoint in `folder` and fills them; leaving the `with` block seals it.

    `shards` maps file names to the tensors in them (name, dtype and shape count; `file` and `start` are assigned here). Threads may
    write at once. The headers are written last, by `seal`: until then every shard starts with eight zero bytes, which no reader takes
    for a safetensors file, so a killed run cannot be loaded as complete. Fill it inside `lmcore.record.published`, which renames:

        with published(out, overwrite=overwrite) as folder, CheckpointWriter(folder, shards_like(late)) as writer:
            writer.write(name, 0, data)

    A single shard is `model.safetensors` (or the name it is given); several come with an index file.
    """

    def __init__(
        self, folder: Path, shards: Mapping[str, Sequence[TensorInfo]], *,
        metadata: Mapping[str, dict[str, str] | None] | None = None, index_metadata: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.tensors: dict[str, TensorInfo] = {}
        self._folder, self._index_metadata = folder, index_metadata
        self._headers: dict[Path, bytes] = {}
        self._descriptors: dict[Path, int] = {}
        try:
            for name, tensors in shards.items():
                self._allocate(folder / name, tensors, (metadata or {}).get(name, {"format": "pt"}))
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write the bytes of `data` (any dtype, C order) at byte `start` of a tensor."""
        tensor = self.tensors[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
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
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text)
        for path, header in self._headers.items():
            os.pwrite(self._descriptors[path], header[8:], 8)
            os.pwrite(self._descriptors[path], header[:8], 0)

    def close(self) -> None:
        """Close the files; unsealed ones stay unreadable."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.seal()
        finally:
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
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{path.parent}: no room for {path.name}, which takes {base + stop:,} bytes") from None
            raise


def shards_like(checkpoint: Checkpoint, dtype: str | None = None) -> dict[str, list[TensorInfo]]:
    """The shards of a checkpoint, to write another like it; `dtype` replaces that of every floating-point tensor."""
    shards: dict[str, list[TensorInfo]] = {name: [] for name in checkpoint.metadata}
    for tensor in checkpoint.tensors.values():
        kind = dtype if dtype and tensor.dtype in ("F64", "F32", "F16", "BF16") else tensor.dtype
        shards[tensor.file.name].append(replace(tensor, dtype=kind))
    return shards
