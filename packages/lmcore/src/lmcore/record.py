"""Files that appear whole or not at all, and the record of a run: config, environment, metrics, result."""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lmcore.errors import UserError


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it: a killed run leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused, since JSON has neither."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


@contextlib.contextmanager
def published(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `out` to fill; when the block ends without an error, it becomes `out` by one rename.

    An existing `out` is an error unless `overwrite`, and is then exchanged atomically where the file system can (Linux). A killed run
    leaves the old `out`, the new one or none, and what it leaves hidden is cleared by the next run; a second process that wants the
    same `out` at the same time gets a `UserError`.
    """
    try:
        out = out.resolve()
        hidden = out.with_name(f".{out.name}.partial")
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError, the root a ValueError
        raise UserError(f"{out} cannot be written: {error}") from None
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(os.close, lock)  # the system does it when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {out}: wait for it or choose another --out") from None
        at_the_end.callback(shutil.rmtree, hidden, ignore_errors=True)
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: choose another --out")
        if out.exists() and not overwrite:
            raise UserError(f"{out} exists: choose another --out or pass --overwrite")
        new = hidden / out.name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            _flush(path)
        if not (out.exists() and _exchange(new, out)):
            shutil.rmtree(out, ignore_errors=True)
            os.rename(new, out)
        _flush(out.parent)


class Run:
    """A run folder: `config.json`, `environment.json`, `metrics.jsonl` (one line per `log`) and `result.json` (by `finish`).

    `config` is a frozen dataclass. A folder that holds another config or seed is refused with a `UserError`.
    """

    def __init__(self, out: Path, config: Any, *, seed: int):
        self.out = out
        path, options = out / "config.json", {**dataclasses.asdict(config), "seed": seed}
        if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(options, default=_plain)):
            raise UserError(f"{path} was written by a run with other options: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
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
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None,
        "versions": {name: installed[name] for name in names if name in installed},
    }


def _flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step with renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE), False where that fails."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or "unknown"


def _plain(value: Any) -> Any:
    """What JSON has no word for: paths become text, arrays and scalars of numpy and torch become numbers."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
