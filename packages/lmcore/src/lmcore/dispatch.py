"""Which implementation of an op should run."""

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def pick(package: str, *tensors: Any) -> ModuleType:
    """Import and return the module beside the op `package` that should run on `tensors`.

    CUDA tensors go to `triton`; CPU tensors to `numba` where the op has it, else to `reference`. `LMCORE_BACKEND=reference|numba|triton`,
    read at each call, overrides: with `TRITON_INTERPRET=1`, that is how the Triton interpreter is chosen. Where the op lacks the asked-for
    back end, the reference runs and a warning says so once. Raises: `ValueError` for an unknown back end in `LMCORE_BACKEND`.

    >>> pick("lmcore.ops.linear_logprob", torch.zeros(1)).__name__
    'lmcore.ops.linear_logprob.reference'
    """
    usual = "triton" if any(tensor.is_cuda for tensor in tensors) else "numba" if _has(package, "numba") else "reference"
    wanted = os.environ.get("LMCORE_BACKEND") or usual
    if wanted not in ("reference", "numba", "triton"):
        raise ValueError(f"LMCORE_BACKEND={wanted!r} is not one of reference, numba, triton")
    if not _has(package, wanted):
        _say_once(f"{package} has no {wanted} implementation: its reference runs")
        wanted = "reference"
    return import_module(f"{package}.{wanted}")


@cache
def _has(package: str, backend: str) -> bool:
    return find_spec(f"{package}.{backend}") is not None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
