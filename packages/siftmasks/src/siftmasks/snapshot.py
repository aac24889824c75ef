"""One version of a store, for reading: every byte of it is checked against the manifest before it is used."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmcore.checkpoint import Checkpoint
from lmcore.errors import UserError
from siftmasks.canonical import file_sha256, quoted, read_json, to_json, unquoted
from siftmasks.commitments import Commitment
from siftmasks.config import StoreConfig

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
BASE = "base.json"
"""Where the base model was found: not canonical, since the model may move."""
MEND = "bring a backup back with `siftmasks restore`, or make the ledgers anew with `siftmasks forget --rebuild`"
"""What helps against damage, in words for an error message."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the SHA-256 of every canonical file, the number of tasks, and the sum of the counts C of each group.

    Its own SHA-256 is the store's digest.
    """

    files: Mapping[str, str]
    tasks: int
    counts: Mapping[str, int]

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        return to_json({"files": dict(self.files), "tasks": self.tasks, "counts": dict(self.counts)})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the file. Raises: `UserError` if it is damaged."""
        try:
            fields, data = read_json(path)
            manifest = cls(dict(fields["files"]), int(fields["tasks"]), dict(fields["counts"]))
            sound = len(manifest.names) == manifest.tasks and data == manifest.to_bytes()
        except UserError as error:
            raise UserError(f"{error}. {_RESTORE}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}. {_RESTORE}") from None
        if not sound:
            raise UserError(f"{path} is damaged: it is not as siftmasks writes it. {_RESTORE}")
        return manifest

    @property
    def digest(self) -> str:
        """The digest of the store."""
        return sha256(self.to_bytes()).hexdigest()

    @property
    def names(self) -> list[str]:
        """The tasks, sorted."""
        return sorted(unquoted(Path(file).stem) for file in self.files if file.startswith("masks/"))


class Snapshot:
    """The version of the store at `path` that stood when this was made.

    A file is hashed when it is first read, and what does not match the manifest is not used: damage cannot get into a served model or
    into a sum, nor can a version that another process publishes meanwhile be mixed with this one. The next version links the files that
    stay as they are, and keeps their digests, without reading them: damage to one goes along, to be found when it is read, or by `check`.
    Raises: `UserError` that names the file that is missing or damaged.
    """

    def __init__(self, path: Path):
        if not (path / MANIFEST).is_file():
            fault = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
            raise UserError(f"{path} is not a store: it {fault}")
        self.path = path
        self.manifest = Manifest.read(path / MANIFEST)
        self.tasks = self.manifest.names
        self.config = StoreConfig.read(self.file("config.json"))
        self._opened: dict[str, Checkpoint] = {}

    def base(self) -> str:
        """Where the base model was at `init`. Raises: `UserError` if `base.json` is missing or damaged."""
        path = self.path / BASE
        fields, data = read_json(path)
        place = fields.get("base")
        if not isinstance(place, str) or data != base_to_bytes(place):
            raise UserError(f"{path} is damaged: its checksum does not match")
        return place

    def file(self, name: str) -> Path:
        """The path of a canonical file, once its bytes are those of the manifest."""
        path = self.path / name
        try:
            sound = file_sha256(path) == self.manifest.files[name]
        except (OSError, KeyError):
            sound = False
        if not sound:
            if Path(self.path, MANIFEST).read_bytes() != self.manifest.to_bytes():
                raise UserError(f"{self.path} was changed by another process meanwhile: try again")
            raise UserError(f"{path} is damaged or missing: it does not match {MANIFEST}. {_FIND}")
        return path

    def check_new(self, tasks: Collection[str], live: Collection[str] | None = None) -> None:
        """Raise `UserError` if a task is among the `live` ones (None: those in the store), or there is no room for all of them."""
        live = self.tasks if live is None else live
        for task in tasks:
            quoted(task)  # refuses what cannot be the name of a file
            if task in live:
                raise UserError(f"task {task!r} is in {self.path} already: forget it first")
        if len(live) + len(tasks) > self.config.max_tasks:
            room = f"{self.path} has {len(live)} of at most {self.config.max_tasks} tasks"
            raise UserError(f"{room}, and {len(tasks)} more are to be learned: forget some, or init a larger store")

    def require(self, tasks: Collection[str]) -> None:
        """Raise `UserError` if there is no task, or one that is not in the store."""
        if not tasks:
            raise UserError("no task is named")
        for task in tasks:
            if mask_file(task) not in self.manifest.files:
                raise UserError(f"task {task!r} is not in {self.path}, which has {self.manifest.tasks} others")

    def groups(self, tasks: Collection[str]) -> set[int]:
        """The groups whose ledgers hold these tasks; all groups, if none is named. Raises: `UserError` for an unknown task."""
        if not tasks:
            return {*range(self.config.groups)}
        self.require(tasks)
        return {self.config.group(task) for task in tasks}

    def remaining(self, forgetting: Collection[str]) -> list[str]:
        """The other tasks of the same groups."""
        groups = self.groups(forgetting)
        return [task for task in self.tasks if self.config.group(task) in groups and task not in forgetting]

    def ledger(self, part: str, name: str, group: int | None = None) -> "torch.Tensor":
        """A part of the ledger ("total" N, "count" C, "positive" P) for one tensor: of one group, or the sum over all."""
        import torch

        dtype, shape = self.config.dtypes[part], self.config.tensors[name][1]
        files = [ledger_file(part, number) for number in (range(self.config.groups) if group is None else (group,))]
        parts = [
            self._tensors(file).tensor(name) for file in files if file in self.manifest.files
        ]  # a group without tasks has none
        if not parts:
            return torch.from_numpy(np.zeros(shape, f"uint{dtype[1:]}"))
        for other in parts[1:]:
            parts[0].numpy()[...] += other.numpy()  # torch does not add uint16 and uint32
        return parts[0]

    def mask(self, task: str, name: str) -> "torch.Tensor":
        """The packed bits of a task for one tensor: its mask (mode "sift") or its signs (mode "signs"), uint8 [ceil(size / 8)]."""
        return self._tensors(mask_file(task)).tensor(name)

    def commitment(self, task: str) -> Commitment:
        """The commitment of a task. Raises: `UserError` if it is missing or damaged."""
        try:
            return Commitment.read(self.path / sidecar_file(task))
        except UserError as error:
            raise UserError(f"{error}. {_FIND}") from None

    def _tensors(self, file: str) -> Checkpoint:
        if file not in self._opened:
            self._opened[file] = Checkpoint.open(self.file(file))
            self.file(file)  # a new version may have replaced it just before it was opened; now it stays open
        return self._opened[file]


def base_to_bytes(place: str) -> bytes:
    """The bytes of `base.json`, with their own checksum."""
    return to_json({"base": place, "checksum": sha256(to_json({"base": place})).hexdigest()})


def in_one_line(task: str) -> str:
    r"""Return a task's id as people read it, as a JSON string if it has characters that do not print.

    >>> print(in_one_line("alice"), in_one_line("two\nlines"))
    alice "two\nlines"
    """
    return task if task.isprintable() and not task.startswith('"') else json.dumps(task)


def mask_file(task: str) -> str:
    """The file of a task's bits, in the store."""
    return f"masks/{quoted(task)}.safetensors"


def archive_file(task: str) -> str:
    """The file of a task's levels, in a store with the policy archive."""
    return f"archive/{quoted(task)}.safetensors"


def sidecar_file(task: str) -> str:
    """The file of a task's commitment, in the store."""
    return f"sidecar/{quoted(task)}.json"


def ledger_file(part: str, group: int) -> str:
    """The file of one part of a group's ledger, in the store."""
    return f"ledger/{part}-{group}.safetensors"


_FIND = f"Find all that is damaged with `siftmasks check`, then {MEND}"
_RESTORE = "Bring a backup back with `siftmasks restore`"
