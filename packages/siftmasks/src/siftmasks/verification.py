"""Proof by rebuild: whether a store is, bit for bit, what the data of its tasks give."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmcore.errors import UserError
from siftmasks.canonical import room_for
from siftmasks.checking import check
from siftmasks.exclusive import Unwritable, locked, scratch
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
    """Learn all tasks again into an empty store, which is then removed, and compare.

    It takes as much room as the store, beside which it is made; if nothing can be written there, in a folder for temporary files (in
    TMPDIR), which a killed process leaves behind. Raises: `UserError` if a file of the store is not as its manifest has it, if data of a
    task are missing, or there are data of a task that is not in the store.
    """
    with _scratch(path) as folder, room_for(folder):
        check(path)
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
    with contextlib.ExitStack() as at_the_end:
        try:
            at_the_end.enter_context(locked(path))  # whoever writes here next clears what a kill leaves
            place = scratch(path)
            place.mkdir()
            at_the_end.callback(shutil.rmtree, place)
        except (Unwritable, PermissionError):
            place = Path(at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="siftmasks-verify-")))
        folder = place / path.name
        folder.mkdir()
        yield folder
