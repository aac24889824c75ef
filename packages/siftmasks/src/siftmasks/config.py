"""What is fixed when a store is made and never changes: it decides, with the tasks alone, every byte of the store."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

from lmcore.errors import UserError
from siftmasks.canonical import from_json, to_json
from siftmasks.settings import SiftSettings

FORMAT = 1
Policy = Literal["rederive", "archive", "groups"]


@dataclass(frozen=True)
class StoreConfig:
    """`config.json`. `tensors` maps the name of each trainable tensor to the dtype and shape that it has in the base checkpoint.

    Raises: `UserError` for a number of tasks that no ledger holds, or groups without the policy of that name.
    """

    settings: SiftSettings
    max_tasks: int
    policy: Policy
    groups: int
    """Ledgers, each of the tasks that a hash assigns to it: a rebuild costs the tasks of one."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    dtypes: Mapping[str, str]
    """Safetensors names of the dtypes of levels and of the parts of a ledger: total N, count C and, in mode "signs", positive P."""
    base: str
    """SHA-256 of the base model (see `base_model.base_sha256`)."""

    @classmethod
    def new(
        cls, settings: SiftSettings, max_tasks: int, policy: Policy, groups: int,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]], base: str,
    ) -> "StoreConfig":  # fmt: skip
        """The configuration of a new store: the dtypes are the smallest in which `max_tasks` tasks cannot overflow.

        Raises: `UserError` for a number of tasks that no ledger holds, groups without the policy of that name, or nothing to train.
        """
        if policy not in ("rederive", "archive", "groups"):
            raise UserError(f"policy {policy}: choose rederive, archive or groups")
        if groups < 1 or (groups > 1) != (policy == "groups"):
            raise UserError(f"groups is {groups}: the policy groups takes 2 or more, the others have 1")
        if not tensors:
            raise UserError("no tensor is trainable: name at least one")
        try:
            total, count = (_NAMES[str(dtype)] for dtype in settings.grid.ledger_dtypes(max_tasks))
        except ValueError as error:
            raise UserError(str(error)) from None
        dtypes = {"levels": _NAMES[str(settings.grid.level_dtype)], "total": total, "count": count}
        if settings.mode == "signs":
            dtypes["positive"] = total
        return cls(settings, max_tasks, policy, groups, tensors, dtypes, base)

    @property
    def parts(self) -> list[str]:
        """The parts of a ledger."""
        return [part for part in ("total", "count", "positive") if part in self.dtypes]

    @property
    def size(self) -> int:
        """Number of trainable weights."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    def group(self, task: str) -> int:
        """The ledger that a task belongs to: a hash of its id alone, whatever other tasks there are."""
        return int.from_bytes(blake2b(task.encode(), digest_size=8).digest(), "little") % self.groups

    def to_bytes(self) -> bytes:
        """The bytes of `config.json`."""
        tensors = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in self.tensors.items()}
        fields = {name: getattr(self, name) for name in ("max_tasks", "policy", "groups", "dtypes", "base")}
        return to_json({"format": FORMAT, "settings": asdict(self.settings), "tensors": tensors, **fields})

    @property
    def sha256(self) -> str:
        """SHA-256 of `config.json`."""
        return sha256(self.to_bytes()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "StoreConfig":
        """Read `config.json`. Raises: `UserError` that names it if it is damaged or of a newer format."""
        fields: dict[str, Any] = from_json(path)
        version = fields.pop("format", None)
        if isinstance(version, int) and version > FORMAT:
            raise UserError(f"{path} has format {version}, this siftmasks reads up to {FORMAT}: install a newer one")
        try:
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in fields.pop("tensors").items()}
            return cls(settings=SiftSettings(**fields.pop("settings")), tensors=tensors, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None


_NAMES = {"torch.uint8": "U8", "torch.uint16": "U16", "torch.uint32": "U32"}
