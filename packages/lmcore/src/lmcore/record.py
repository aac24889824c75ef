"""Files that appear whole or not at all, a cache of them, and the record of a run: config, environment, metrics, result."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import operator
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmcore.errors import UserError

_plain = operator.methodcaller("tolist")  # arrays and scalars of numpy and torch


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it: a killed run leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; arrays become lists; NaN and infinity, which JSON lacks, are refused."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


@contextlib.contextmanager
def published(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `out` to fill; when the block ends without an error, it becomes `out` by one rename.

    An existing `out` is an error unless `overwrite`, and is then exchanged atomically where the system can (Linux). A killed run leaves
    the old `out`, the new one or none; the next run clears what it left hidden. Another process writing `out` meanwhile is a `UserError`.
    """
    try:
        out = out.resolve()
        hidden = out.with_name(f".{out.name}.partial")
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError, the root a ValueError
        raise UserError(f"{out} cannot be written: {error}") from None
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(os.close, lock)  # releases the lock; so does the end of the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {out}: wait for it or choose another --out") from None
        at_the_end.callback(shutil.rmtree, hidden, ignore_errors=True)
        if out.exists() and not (overwrite and out.is_dir()):
            raise UserError(f"{out} {'exists: pass --overwrite or' if out.is_dir() else 'is a file:'} choose another --out")
        new = hidden / out.name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            _flush(path)
        exchange = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)  # (AT_FDCWD, new, AT_FDCWD, out, RENAME_EXCHANGE)
        if not out.exists() or exchange(-100, os.fsencode(new), -100, os.fsencode(out), 2) != 0:
            shutil.rmtree(out, ignore_errors=True)
            os.rename(new, out)
        _flush(out.parent)


def cached(name: str, inputs: Any, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `make(folder)` once for each value of `inputs` (JSON: all that the content depends on).

    It appears by one rename: a killed `make` leaves nothing that looks finished. Of two processes, one makes it and the other waits.
    The cache is `$TENFOLD_CACHE`, else `$XDG_CACHE_HOME/tenfold`, else `~/.cache/tenfold`.
    """
    base = os.environ.get("TENFOLD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tenfold")
    folder = Path(base, f"{name}-{hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()}")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system drops it when the process ends, however it ends
            if not folder.is_dir():  # made by another process meanwhile
                with published(folder) as unfinished:
                    make(unfinished)
    return folder


class Run:
    """A run folder: `config.json`, `environment.json`, `metrics.jsonl` (one line per `log`) and `result.json` (by `finish`).

    `config` has every option that the result depends on, the seed too. A folder that holds another is refused with a `UserError`.
    """

    def __init__(self, out: Path, config: Mapping[str, Any]):
        self.out, path = out, out / "config.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found != json.loads(json.dumps(config)) and (path.exists() or (out.exists() and any(out.iterdir()))):
            raise UserError(f"{out} holds a run with other options, or other files: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
        write_json(out / "environment.json", environment())

    def log(self, **metrics: Any) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics, default=_plain) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`: its presence says that the run is complete."""
        write_json(self.out / "result.json", result)


def environment() -> dict[str, Any]:
    """Machine and versions: what a reader needs beside a measurement. Nothing of it names the machine or its paths."""
    names = ("torch", "transformers", "numpy", "numba", "triton", "safetensors")
    torch, cpuinfo = sys.modules.get("torch"), Path("/proc/cpuinfo")
    processors = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processors[0].partition(":")[2].strip() if processors else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None,
        "versions": {name: metadata.version(name) for name in names if find_spec(name)},
    }


def package_folder(package: str, install: str) -> Path:
    """Where a package lies, found without importing it; a `UserError` with the command `install` where it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


def _flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
