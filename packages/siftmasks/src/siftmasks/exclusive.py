"""One writer at a time, and nothing left of the writers that were killed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmcore.errors import UserError


class Unwritable(UserError):
    """Nothing can be written beside a store."""


@contextlib.contextmanager
def locked(path: Path, *, new: bool = False) -> Iterator[None]:
    """Hold the lock of the store at `path`, an empty file `.NAME.lock` beside it, and clear what killed writers left.

    For a `new` store, the folders above it are made. The system releases the lock when the process ends, however it ends.
    Raises: `UserError` at once if another writer holds it; `Unwritable` if the file cannot be made.
    """
    try:
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written to: {error.strerror} beside it") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {path}: try again when it has finished") from None
        for remains in _remains(path):
            shutil.rmtree(remains)
        yield
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Clear what killed writers left, which may hold a task that is forgotten, unless a writer is at work or the place is read-only."""
    if _remains(path):
        with contextlib.suppress(UserError, OSError), locked(path):
            pass


def check_cleared(path: Path) -> None:
    """Raise `UserError` if the version before is still there in part, as where another program holds its files open over a network."""
    if remains := _remains(path):
        raise UserError(f"{path} is written, but its old version could not be removed: remove {remains[0]}, then certify it")


def scratch(path: Path) -> Path:
    """The folder beside the store at `path` for what is never published; it counts as remains."""
    return path.with_name(f".{path.name}.scratch")


def _remains(path: Path) -> list[Path]:
    return [place for place in (path.with_name(f".{path.name}.partial"), scratch(path)) if place.exists()]
