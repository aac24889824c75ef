"""What every test of the workspace runs under: the Triton interpreter without a GPU, and shapes checked at each call."""

import os
import signal
import sys
import tempfile
import types
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Only makes Triton selectable where there is no GPU; tests ask for it by name. Must be set before triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, which tests send

ROOT = Path(__file__).parent


class _KernelsUntouched(PathFinder):
    """Leaves `triton.py` and `numba.py` as written: their compilers read the source and cannot see through a wrapper."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        own = fullname.partition(".")[0] in _packages
        if own and fullname.rpartition(".")[2] in ("triton", "numba", "rounding"):
            return super().find_spec(fullname, path, target)
        return None


_packages = [path.parent.name for path in ROOT.glob("packages/*/src/*/__init__.py")]
_checker = types.ModuleType("_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers hold
sys.modules["_checker"] = _checker
install_import_hook(_packages, "_checker.check")
sys.meta_path.insert(0, _KernelsUntouched)


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace):
    import numpy
    import torch

    doctest_namespace.update(torch=torch, np=numpy, tempfile=tempfile, Path=Path)
    torch.manual_seed(0)
