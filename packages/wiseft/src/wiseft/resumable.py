"""A file of results that only grows, beside the configuration they were drawn under, so that a killed run can go on."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lmcore.errors import UserError
from lmcore.record import environment, write_json

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def continued(
    path: Path, config: dict[str, Any], *, overwrite: bool = False, results: Sequence[str] = ()
) -> Iterator[BinaryIO]:
    """Open `path` for reading from its start and appending, its folder made if need be, locked until the block ends.

    `run.json` beside it holds the name of the file, `config` and the environment of the first start. A run with another configuration
    is refused unless it has drawn nothing yet; with `overwrite` the file is emptied and the `results` made from it are deleted. Without
    a `run.json` none of these files may be there: they are not ours.

    Raises: `UserError` if the folder cannot be written, another process has the lock (the system drops it when that one ends), the
    folder holds another run (naming what differs) or what no such run wrote, or the disk is full in the end.
    """
    out = path.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+b")  # noqa: SIM115 (closed by the with below, whose errors are others)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
    try:
        with opened as file:
            _lock(file, out)
            _settle(file, path, config, overwrite, results)
            file.seek(0)
            yield file
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"{out}: {error.strerror}; make room and run the same command again to go on") from None


def _lock(file: BinaryIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing into {out}: wait for it or choose another --out") from None


def _settle(file: BinaryIO, path: Path, config: dict[str, Any], overwrite: bool, results: Sequence[str]) -> None:
    """Leave `run.json` holding `config`, and `file` nothing that was drawn under another one."""
    record = path.with_name("run.json")
    config = json.loads(json.dumps(config))
    empty = os.fstat(file.fileno()).st_size == 0
    if record.exists():
        before = _read(record, path.name)
        if before == config:
            return
        if not (empty or overwrite):
            names = [name for name in {**before, **config} if before.get(name) != config.get(name)]
            differences = "; ".join(f"{name}: {before.get(name)} before, {config.get(name)} now" for name in names)
            raise UserError(f"{path.parent} holds another run ({differences}): choose another --out or pass --overwrite")
    else:
        for name in [path.name] * (not empty) + [name for name in results if path.with_name(name).exists()]:
            raise UserError(f"{path.with_name(name)} is there, but run.json is missing: choose another --out or delete it")
    file.truncate(0)  # before the new configuration is there: a kill in between must not pair it with what was drawn before
    os.fsync(file.fileno())
    for name in results:
        path.with_name(name).unlink(missing_ok=True)
    write_json(record, {"file": path.name, "config": config, "environment": environment()})


def _read(record: Path, file: str) -> dict[str, Any]:
    """The configuration in run.json, which must be that of a run into `file`."""
    try:
        found = json.loads(record.read_text())
        if found["file"] == file:
            return dict(found["config"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record} is damaged: choose another --out, or delete it with the run's other files") from None
    raise UserError(f"{record} is that of a run into {found['file']}: choose another --out")
