"""A file of JSON lines that is written chunk by chunk, goes on after a kill, and appears whole."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmcore.errors import UserError
from lmcore.record import write_atomically


class Growing:
    """The rows so far, and where the next are to be kept."""

    def __init__(self, rows: list[dict[str, Any]], descriptor: int | None):
        self.rows = rows
        self._descriptor = descriptor

    def add(self, chunk: Sequence[Mapping[str, Any]]) -> None:
        """Add rows that belong together: after a kill they are all there or none is."""
        self.rows += map(dict, chunk)
        if self._descriptor is not None:
            os.write(self._descriptor, _line([*chunk]))
            os.fsync(self._descriptor)


@contextmanager
def growing(out: Path | None, config: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Growing]:
    """Begin the rows of `out`, or go on with those that a run with the same `config` left; without `out` they are in memory alone.

    Until the block ends without an error they are in a hidden file beside `out`, one chunk per line after the config.
    Raises: `UserError` if `out` exists, or was left unfinished by a run with another config, unless `overwrite`; if another process
    writes it; if it cannot be written.
    """
    if out is None:
        yield Growing([], None)
        return
    if out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"{out} exists: choose another --out" + (" or pass --overwrite" if out.is_file() else ""))
    hidden = out.with_name(f".{out.name}.unfinished")
    try:
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file = Growing(_rows(hidden, descriptor, json.loads(json.dumps(config)), overwrite), descriptor)
        yield file
        write_atomically(out, b"".join(map(_line, file.rows)))
        hidden.unlink()
    except BlockingIOError:
        raise UserError(f"another process is writing {out}: wait for it or choose another --out") from None
    finally:
        os.close(descriptor)


def _rows(hidden: Path, descriptor: int, config: Any, overwrite: bool) -> list[dict[str, Any]]:
    """What an earlier run kept, once the file ends with a whole line."""
    data = hidden.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    first, *chunks = [json.loads(line) for line in whole.splitlines()] or [None]
    if first != config:
        if chunks and not overwrite:
            raise UserError(
                f"{hidden} is of an unfinished run with other options: finish that, pass --overwrite or choose another --out"
            )
        whole, chunks = _line(config), []
        os.truncate(descriptor, 0)
        os.write(descriptor, whole)
    os.truncate(descriptor, len(whole))
    return [row for chunk in chunks for row in chunk]


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode() + b"\n"
