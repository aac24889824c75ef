"""Where a command may write."""

from collections.abc import Iterable
from pathlib import Path

from lmcore.errors import UserError


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise a `UserError` if `out` is, holds or lies in one of `inputs`, links and what they lead to."""
    place = out.resolve()
    for path in inputs:
        for read in (path.resolve(), path.parent.resolve() / path.name):
            if place == read or place in read.parents or read in place.parents:
                raise UserError(f"--out {out} would write into the input {path}: choose another --out")


def check_place(out: Path, inputs: Iterable[Path], overwrite: bool, record: str) -> None:
    """Refuse to write into what is read, and to replace anything but what the same command wrote before.

    `out` lies apart from `inputs` (`check_apart`). If it exists, `overwrite` must be given, and its file
    `record` must show that the command wrote it; an empty folder needs none. Raises: `UserError`.
    """
    check_apart(out, inputs)
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists: choose another --out or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / record).is_file()):
        raise UserError(f"{out} has no {record}, so this command did not write it: remove it or choose another --out")
