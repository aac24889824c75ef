"""Copies of a whole store. A backup keeps what is forgotten later: delete it then, or forget in it too."""

import shutil
from pathlib import Path

from lmcore.errors import UserError
from lmcore.record import published
from siftmasks.canonical import room_for
from siftmasks.checking import check
from siftmasks.exclusive import locked
from siftmasks.snapshot import Snapshot


def copy_store(source: Path, target: Path) -> None:
    """Copy a store, in bytes of its own, to a folder that does not exist yet, and check every byte of the copy, which is a store too.

    Raises: `UserError` if the source is no store, damaged or changed meanwhile, or if the target exists or lies inside the source.
    """
    Snapshot(source)
    if target.exists():
        raise UserError(f"{target} exists: choose another folder")
    if source in target.parents:
        raise UserError(f"{target} lies inside {source}: choose another folder")
    with locked(target, new=True), room_for(target), published(target) as folder:
        try:
            for path in source.rglob("*"):
                if not path.is_dir():
                    copy = folder / path.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
            check(folder)
        except (UserError, FileNotFoundError) as error:
            raise UserError(f"{source} is damaged, or was changed while it was copied ({error})") from None
