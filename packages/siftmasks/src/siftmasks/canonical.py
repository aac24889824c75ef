"""Canonical bytes: files that depend on what they hold and on nothing else, hashed while they are written."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from lmcore.checkpoint import DTYPES
from lmcore.errors import UserError

LONGEST_NAME = 200
"""Bytes of a task id once quoted: with its ending it must stay below the 255 that file systems allow."""


def to_json(value: Any) -> bytes:
    """Return the JSON of `value` with sorted keys: equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def from_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: `UserError` that names the file if it is missing or damaged."""
    return read_json(path)[0]


def read_json(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read a JSON object and give its bytes too: a second read might find those of another version. Raises: as `from_json`."""
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value, data


def quoted(task: str) -> str:
    """Return the name of a task's files, without their ending: percent-encoded, so that no id can name another place.

    >>> quoted("../alice smith")
    '%2E%2E%2Falice%20smith'

    Raises: `UserError` for an id that is empty, too long or no valid Unicode.
    """
    try:
        name = quote(task, safe="").replace(".", "%2E")
    except UnicodeEncodeError:
        raise UserError(f"task id {task!r} is not valid Unicode") from None
    if not 0 < len(name) <= LONGEST_NAME:
        fault = f"takes {len(name)} bytes as a file name, more than {LONGEST_NAME}" if name else "is empty"
        raise UserError(f"task id {task!r} {fault}: choose another")
    return name


def unquoted(name: str) -> str:
    """Return the task whose files bear this name."""
    return unquote(name)


class TensorFile:
    """A safetensors file, written tensor by tensor in the order of their names; its SHA-256 is known when the last one is written.

    `tensors` maps names to dtype (by its safetensors name) and shape. The file is opened for each write only, so that those of hundreds
    of tasks can grow side by side. Order, header and padding are fixed here, since they are part of a store's identity.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]):
        header: dict[str, Any] = {}
        stop = 0
        for name in sorted(tensors):
            dtype, shape = tensors[name]
            start, stop = stop, stop + DTYPES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [start, stop]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self._left = [(name, entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()][::-1]
        self._hash = sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append(memoryview(len(text).to_bytes(8, "little") + text), "xb")

    def write(self, name: str, data: np.ndarray) -> None:
        """Write the next tensor whole, as the bytes of `data` in C order."""
        expected, nbytes = self._left.pop()
        if (name, data.nbytes) != (expected, nbytes):
            raise ValueError(f"{name} with {data.nbytes} bytes, where {expected} with {nbytes} is next in {self.path.name}")
        self._append(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data, "ab")

    def digest(self) -> str:
        """Return the SHA-256 of the complete file."""
        if self._left:
            raise ValueError(f"{self.path.name} lacks {self._left[-1][0]}")
        return self._hash.hexdigest()

    def _append(self, data: memoryview, mode: str) -> None:
        with open(self.path, mode, buffering=0) as file:
            done = 0
            while done < len(data):
                done += os.write(file.fileno(), data[done:])
        self._hash.update(data)


def write_hashed(path: Path, data: bytes) -> str:
    """Write a new file; returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256(data).hexdigest()


def file_sha256(path: Path, *, remembered: bool = True) -> str:
    """Return the SHA-256 of a file; one that this process has read before, unchanged by its inode, size and times, is not read again.

    The time of the last change of the inode is among them: no program can set it back. A new hard link moves it too, and costs a hash.
    """
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if not (remembered and identity in _known):
            digest, block = sha256(), memoryview(bytearray(2**20))
            while count := file.readinto(block):
                digest.update(block[:count])
            _known[identity] = digest.hexdigest()
    return _known[identity]


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no hard links. Raises: `UserError` if it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source} is missing: restore a backup, or rebuild") from None
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn a disk, quota or file size that is exhausted into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"no room beside {path} for its next version ({error.strerror}): it is unchanged") from None
        raise


_known: dict[tuple[int, ...], str] = {}
