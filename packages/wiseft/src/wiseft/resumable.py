"""A file that only grows and that one process at a time may grow: what sampling writes to, so that a killed run can go on."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lmcore.errors import UserError


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading from its start and appending, its folder made if need be, locked until the block ends.

    Raises: `UserError` if the folder is a file, or if another process holds the lock (the system drops it when that one ends).
    """
    out = path.parent
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing into {out}: wait for it or choose another --out") from None
        file.seek(0)
        yield file
