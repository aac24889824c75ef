"""Proof by rebuild: whether a store is, bit for bit, what the data of its tasks give."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmcore.errors import UserError
from siftmasks.canonical import room_for
from siftmasks.exclusive import locked, scratch
from siftmasks.learning import contribute_checkpoints
from siftmasks.next_version import NextVersion
from siftmasks.snapshot import Snapshot
from siftmasks.training import Training


@dataclass(frozen=True)
class Verification:
    """The digest of a store and that of its full rebuild; `different` names the canonical files that are not the same."""

    digest: str
    rebuilt: str
    different: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether they are the same, bit for bit."""
        return self.digest == self.rebuilt


def verify(path: Path, training: Training, checkpoints: Mapping[str, str | os.PathLike[str]]) -> Verification:
    """Learn all tasks again into an empty store beside this one, which is then removed, and compare.

    Raises: `UserError` if data of a task are missing, or there are data of a task that is not in the store.
    """
    with locked(path), room_for(path), _scratch(path) as folder:
        old = Snapshot(path)
        given = {*training.examples, *checkpoints}
        if given != {*old.tasks}:
            task = min(given ^ {*old.tasks})
            raise UserError(
                f"task {task!r} is {'not in the store' if task in given else 'missing from the data'}: verify takes all and no others"
            )
        version = NextVersion(old, folder)
        for group in range(old.config.groups):
            version.begin_anew(group)
        for task, vector in training.vectors(old.config, training.examples):
            version.add(task, vector)
        if checkpoints:
            contribute_checkpoints(version, training.base(), checkpoints)
        new = version.finish()
    files = (old.manifest.files, new.files)
    different = (name for name in sorted(files[0].keys() | files[1].keys()) if files[0].get(name) != files[1].get(name))
    return Verification(old.manifest.digest, new.digest, tuple(different))


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    folder = scratch(path) / path.name
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(scratch(path))
