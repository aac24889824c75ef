"""What lies inside installed packages, and the cache of what is made from it."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmcore.errors import UserError
from lmcore.record import published


def package_folder(package: str, install: str) -> Path:
    """Where a package lies, found without importing it; a `UserError` with the command `install` where it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


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
