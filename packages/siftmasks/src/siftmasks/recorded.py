"""The levels and bits of one task on disk, written and read tensor by tensor."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmcore.checkpoint import Checkpoint, TensorInfo
from lmcore.errors import UserError
from siftmasks.canonical import TensorFile
from siftmasks.commitments import commit
from siftmasks.config import StoreConfig


class TaskWriter:
    """Writes levels and bits in the order of the tensors' names, and commits to each tensor under `key` in passing."""

    def __init__(self, config: StoreConfig, key: bytes, levels: Path, bits: Path):
        self._config, self._key = config, key
        self._levels = TensorFile(
            levels, {name: (config.dtypes["levels"], shape) for name, (_, shape) in config.tensors.items()}
        )
        self._bits = TensorFile(
            bits, {name: ("U8", [-(-math.prod(shape) // 8)]) for name, (_, shape) in config.tensors.items()}
        )
        self.commitments: dict[str, str] = {}

    def write(self, name: str, levels: Tensor, bits: Tensor) -> None:
        """Write the next tensor."""
        numbers, packed = levels.numpy(), bits.numpy()
        if numbers.size and numbers.max() > self._config.settings.grid.largest:
            raise ValueError(f"{name} has a level of {numbers.max()}, beyond the grid's {self._config.settings.grid.largest}")
        self._levels.write(name, numbers)
        self._bits.write(name, packed)
        signs = packed if self._config.settings.mode == "signs" else None
        self.commitments[name] = commit(self._key, name, numbers, signs)

    def bits_digest(self) -> str:
        """SHA-256 of the file of bits, once it is complete."""
        return self._bits.digest()

    def recorded(self) -> "RecordedTask":
        """What was written, for reading."""
        return RecordedTask(self._config, self._levels.path, self._bits.path)


class RecordedTask:
    """Reads what a `TaskWriter` wrote."""

    def __init__(self, config: StoreConfig, levels: Path, bits: Path):
        with Checkpoint.open(levels) as opened:
            self._levels = opened.tensors
        with Checkpoint.open(bits) as opened:
            self._signs = opened.tensors if config.settings.mode == "signs" else None

    def levels(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The levels of one tensor and, in mode "signs", its packed signs."""
        return read_tensor(self._levels[name]), None if self._signs is None else read_tensor(self._signs[name])

    def commitments(self, key: bytes) -> dict[str, str]:
        """Commit to every tensor under `key`."""
        found = {}
        for name in self._levels:
            levels, signs = self.levels(name)
            found[name] = commit(key, name, levels.numpy(), None if signs is None else signs.numpy())
        return found


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor of a checkpoint that is not held open: there may be more tasks than files that a process may have open.

    Raises: `UserError` if the file is gone or has become shorter.
    """
    try:
        data = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.start)
    except OSError as error:
        raise UserError(f"{info.file} cannot be read: {error.strerror}") from None
    if len(data) < info.nbytes:
        raise UserError(f"{info.file}: tensor {info.name} ends early: the file became shorter while it was read")
    return torch.from_numpy(data).view(_DTYPES[info.dtype]).view(info.shape)


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip
