"""Commitments: what proves that a re-derived task vector is the one that was learned, and says nothing once its key is gone."""

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lmcore.errors import UserError
from lmcore.record import environment
from siftmasks.canonical import read_json, to_json


class RederivationMismatch(UserError):
    """A task vector is not the one that was learned; the store is unchanged. `tensors` maps tasks to the tensors that differ."""

    def __init__(self, message: str, tensors: dict[str, list[str]]):
        super().__init__(message)
        self.tensors = tensors


def commit(key: bytes, name: str, levels: np.ndarray, signs: np.ndarray | None) -> str:
    """Return HMAC-SHA256 under a task's `key` of a tensor's name, dtype and shape, its levels and, in mode "signs", its packed signs."""
    code = hmac.new(key, repr((name, levels.dtype.name, levels.shape)).encode(), sha256)
    for data in (levels, signs):
        if data is not None:
            code.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return code.hexdigest()


@dataclass(frozen=True)
class Commitment:
    """`sidecar/TASK.json`: a random key, one commitment per tensor under it, and the machine and libraries that the task was learned with.

    It lies outside the store's digest and is deleted with the task. A plain hash would let anyone with a guess of the data confirm it
    from a log; without the key, commitments are random numbers.
    """

    key: bytes
    tensors: Mapping[str, str]
    environment: Mapping[str, Any]

    @staticmethod
    def new_key() -> bytes:
        """32 random bytes from the operating system."""
        return os.urandom(32)

    def mismatches(self, found: Mapping[str, str]) -> list[str]:
        """The tensors whose commitments in `found`, made under the same key, are not these: their levels are not those learned."""
        return [name for name, code in self.tensors.items() if not hmac.compare_digest(code, found.get(name, ""))]

    def to_bytes(self) -> bytes:
        """The bytes of the sidecar, with their own checksum, so that damage is not taken for a mismatch."""
        fields = {"key": self.key.hex(), "tensors": dict(self.tensors), "environment": dict(self.environment)}
        return to_json({**fields, "checksum": sha256(to_json(fields)).hexdigest()})

    @classmethod
    def read(cls, path: Path) -> "Commitment":
        """Read a sidecar. Raises: `UserError` that names it if it is missing or damaged."""
        fields, data = read_json(path)
        try:
            commitment = cls(bytes.fromhex(fields["key"]), dict(fields["tensors"]), dict(fields["environment"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if commitment.to_bytes() != data:
            raise UserError(f"{path} is damaged: its checksum does not match")
        return commitment

    def changes(self) -> str:
        """What differs between here and where the task was learned, in words for an error message."""
        then, now = _flat(self.environment), _flat(here())
        differ = [
            f"{name} {then.get(name)} -> {now.get(name)}" for name in sorted({*then, *now}) if then.get(name) != now.get(name)
        ]
        return ", ".join(differ) or "the same processor and library versions"


@cache
def here() -> dict[str, Any]:
    """The machine and libraries of this process."""
    return environment()


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in fields.items() if name != "versions"}, **fields.get("versions", {})}
